"""Data sets: the same rows every time, broken ones named, none of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from postroad.config.recipe import DataSection
from postroad.reasoning import import_reasoning_gym
from postroad_trainer.data import DataError, Row, open_dataset, order, prompt_index

GOOD = [{"prompt": f"question {number}", "label": str(number), "metadata": {"n": number}} for number in range(5)]


def section(path: Path | str, **keywords) -> DataSection:
    return DataSection(kind=keywords.pop("kind", "file"), path=str(path), **keywords)


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def gym(**keywords) -> DataSection:
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return DataSection(kind="reasoning_gym", **{"task": "products", "settings": settings, "size": 50, **keywords})


def contents(data) -> list[str]:
    return [row.prompt[-1]["content"] for row in data.rows]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def arrow_file(path: Path, rows, streaming: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.Table.from_pylist(rows)
    new = arrow.ipc.new_stream if streaming else arrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def parquet_file(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def saved_folder(path: Path, rows) -> Path:
    names = [f"data-0000{part}-of-00002.arrow" for part in range(2)]
    arrow_file(path / names[0], rows[:2])
    arrow_file(path / names[1], rows[2:])
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


def saved_splits(path: Path, rows) -> Path:
    saved_folder(path / "train", rows)
    saved_folder(path / "test", rows[:1] * 3)
    (path / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    return path


def downloaded_folder(path: Path, rows) -> Path:
    parquet_file(path / "data" / "train-00000-of-00002.parquet", rows[:3])
    parquet_file(path / "data" / "train-00001-of-00002.parquet", rows[3:])
    parquet_file(path / "data" / "test-00000-of-00001.parquet", rows[:1])
    (path / "README.md").write_text("a card")
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: jsonl(folder / "a.jsonl", GOOD), lambda folder: parquet_file(folder / "a.parquet", GOOD),
        lambda folder: arrow_file(folder / "a.arrow", GOOD),
        lambda folder: arrow_file(folder / "a.arrow", GOOD, streaming=False),
        lambda folder: saved_folder(folder / "saved", GOOD), lambda folder: saved_splits(folder / "saved", GOOD),
        lambda folder: downloaded_folder(folder / "hub", GOOD),
        lambda folder: jsonl(folder / "lines" / "a.jsonl", GOOD).parent,
    ],
    ids=["jsonl", "parquet", "arrow-stream", "arrow-file", "saved", "saved-splits", "downloaded", "folder-of-jsonl"],
)  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path, make):
    data = open_dataset(section(make(tmp_path)))
    assert contents(data) == [row["prompt"] for row in GOOD]
    assert [row.label for row in data.rows] == ["0", "1", "2", "3", "4"]
    assert [row.metadata for row in data.rows] == [{"n": number} for number in range(5)]
    assert len({row.id for row in data.rows}) == 5
    assert data.row(1).prompt == [{"role": "user", "content": "question 1"}]


def test_chat_messages_other_columns_and_a_system_message(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "d"}]
    path = parquet_file(tmp_path / "a.parquet", [{"q": chat, "answer": 3, "unused": 1}, {"q": own, "answer": 4}])
    data = open_dataset(section(path, prompt_key="q", label_key="answer", system="be brief"))
    assert data.row(0).prompt == [{"role": "system", "content": "be brief"}, *chat]
    assert data.row(1).prompt == own
    assert [row.label for row in data.rows] == [3, 4]


BROKEN = [
    ('{"prompt": ', "not JSON"), ("[1]", "must be a mapping of columns, not list"), ({"text": "x"}, "'prompt' is missing"),
    ({"prompt": "", "label": "1"}, "'prompt' is empty"), ({"prompt": [], "label": "1"}, "'prompt' is empty"),
    ({"prompt": 5, "label": "1"}, "text or a list of chat messages, not int 5"),
    ({"prompt": [{"role": "user"}], "label": "1"}, "needs a role and a content"),
    ({"prompt": "no label"}, "'label' is missing or null"),
    ({"prompt": "bad", "label": "1", "metadata": "text"}, "'metadata' must be a mapping"),
    ('{"prompt": "x", "label": NaN}', "label: nan is not a finite number"),
    ({"prompt": "y", "label": 2**70}, "more than 64 bits"), ("\x00", "not JSON"),
]  # fmt: skip


def test_broken_rows_are_named_with_their_lines_and_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [GOOD[0], *(row for row, _ in BROKEN), GOOD[1]])
    data = open_dataset(section(path, max_broken_rows=len(BROKEN)))
    assert contents(data) == ["question 0", "question 1"]
    assert len(data.report.broken) == len(BROKEN)
    for line, (fault, (_, text)) in enumerate(zip(data.report.broken, BROKEN, strict=True), 2):
        assert fault.startswith(f"a.jsonl line {line}: ") and text in fault
    with pytest.raises(DataError, match=r"12 broken rows, data\.max_broken_rows allows 11") as caught:
        open_dataset(section(path, max_broken_rows=len(BROKEN) - 1))
    assert str(caught.value).count("a.jsonl line") == 10 and "and 2 more" in str(caught.value)


def test_bytes_that_are_no_text_are_a_broken_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n' + json.dumps(GOOD[0]).encode())
    assert len(open_dataset(section(path, max_broken_rows=1))) == 1


def test_duplicates_are_kept_once_and_held_out_rows_left_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*GOOD, *GOOD[:2]])
    held_out = open_dataset(section(jsonl(tmp_path / "b.jsonl", GOOD[3:]), system="another system message"))
    data = open_dataset(section(path), exclude=held_out.prompts(1))
    assert contents(data) == ["question 0", "question 1", "question 2", "question 4"]
    assert (data.report.duplicates, data.report.excluded) == (2, 1)
    with pytest.raises(DataError, match="no usable row"):
        open_dataset(section(path), exclude=data.prompts() | held_out.prompts())


def test_long_prompts_are_broken_rows(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*GOOD, {"prompt": "a b c d", "label": "1"}])

    def count(prompt):
        return len(prompt[-1]["content"].split())

    data = open_dataset(section(path, max_prompt_tokens=3, max_broken_rows=1), count_tokens=count)
    assert len(data) == 5 and "has 4 tokens, data.max_prompt_tokens allows 3" in data.report.broken[0]
    with pytest.raises(DataError, match="tokenizer"):
        open_dataset(section(path, max_prompt_tokens=3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: folder / "none.jsonl", "does not exist"),
        (lambda folder: jsonl(folder / "a.csv", GOOD), r"ending '\.csv'; known: \.jsonl"),
        (lambda folder: jsonl(folder / "a.jsonl", []), "no usable row"),
        (lambda folder: jsonl(folder / "a.parquet", GOOD), "can't be read"),
        (lambda folder: jsonl(folder / "a.arrow", GOOD), "can't be read"),
        (lambda folder: folder, "holds no file"),
        (lambda folder: parquet_file(jsonl(folder / "a.jsonl", GOOD).with_name("b.parquet"), GOOD).parent, "several formats"),
    ],
    ids=["missing", "ending", "empty", "parquet", "arrow", "empty-folder", "mixed"],
)  # fmt: skip
def test_a_path_that_cannot_be_used_is_explained(tmp_path, make, text):
    with pytest.raises(DataError, match=text):
        open_dataset(section(make(tmp_path)))


def test_an_unfinished_saved_folder_and_other_splits_are_explained(tmp_path):
    folder = saved_folder(tmp_path / "saved", GOOD)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        open_dataset(section(folder))
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text(json.dumps({"splits": ["a", "b"]}))
    with pytest.raises(DataError, match="holds the splits a, b"):
        open_dataset(section(splits))


# ── generated rows and a user's class ────────────────────────────────────────────────────────────────────────────────
def test_generated_rows_are_the_same_every_time_and_travel(tmp_path):
    first, second = open_dataset(gym()), open_dataset(gym())
    assert first.rows == second.rows and first.report.duplicates > 0
    metadata = first.row(0).metadata
    assert (metadata["task"], metadata["seed"], metadata["size"]) == ("products", 1, 50)
    assert first.row(0).prompt[0]["content"] == metadata["entry"]["question"]
    assert first.row(0).label == metadata["entry"]["answer"]
    for row in first.rows:
        assert msgpack.unpackb(msgpack.packb(row.metadata)) == json.loads(json.dumps(row.metadata)) == row.metadata
    assert open_dataset(gym(seed=2)).rows != first.rows


def test_a_held_out_question_is_not_in_the_training_rows():
    held_out = open_dataset(gym(seed=977, size=40))
    train = open_dataset(gym(size=2000), exclude=held_out.prompts())
    assert not train.prompts() & held_out.prompts() and train.report.excluded > 0 and len(train) > 20


@pytest.mark.parametrize("task", ["chain_sum", "sudoku", "gcd", "countdown", "arc_1d", "graph_color"])
def test_entries_travel_and_still_score(task):
    reasoning_gym = import_reasoning_gym()
    row = open_dataset(gym(task=task, settings={}, size=1)).row(0)
    entry = msgpack.unpackb(msgpack.packb(row.metadata), strict_map_key=False)["entry"]
    data = reasoning_gym.create_dataset(task, size=1, seed=1)
    assert data.score_answer(entry["answer"], entry) == data.score_answer(data[0]["answer"], data[0])


@pytest.mark.parametrize(
    ("keywords", "text"),
    [({"task": "product"}, "did you mean 'products'"), ({"task": "rearc", "settings": {}}, "can't travel"),
     ({"settings": {"terms": 2}}, "do not suit reasoning-gym's products"),
     ({"settings": {"min_terms": 3, "max_terms": 2}}, "do not suit reasoning-gym's products")],
)  # fmt: skip
def test_wrong_generated_tasks_are_explained(keywords, text):
    with pytest.raises(DataError, match=text):
        open_dataset(gym(**keywords))


class Squares:
    """What a user may write: anything that is iterated over once."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter(Row(f"square-{n}", [{"role": "user", "content": f"{n} squared"}], n * n) for n in range(self.count))


def test_a_users_class(monkeypatch, tmp_path):
    monkeypatch.setattr("postroad_trainer.data.toys.Squares", Squares, raising=False)
    data = open_dataset(section("postroad_trainer.data.toys.Squares", kind="class", settings={"count": 3}))
    assert [(row.id, row.label) for row in data.rows] == [("square-0", 0), ("square-1", 1), ("square-2", 4)]
    with pytest.raises(DataError, match="does not give rows for"):
        open_dataset(section("postroad_trainer.data.toys.Squares", kind="class", settings={"counts": 3}))
    for path in ("no_module.Name", "postroad_trainer.data.toys.Missing", "nodots"):
        with pytest.raises(DataError, match="can't be used"):
            open_dataset(section(path, kind="class"))


def test_the_toys():
    copied = open_dataset(section("postroad_trainer.data.toys.copy_digits", kind="class", settings={"size": 20}))
    assert all(row.label == row.prompt[0]["content"] and len(row.label) == 4 for row in copied.rows)
    ordered = open_dataset(section("postroad_trainer.data.toys.sort_digits", kind="class", settings={"size": 20}))
    assert all(row.label == "".join(sorted(row.prompt[0]["content"])) for row in ordered.rows)


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    assert sorted(order(3, 0, 100)) == list(range(100))
    assert order(0, 0, 8).tolist() == GOLDEN
    assert not np.array_equal(order(3, 0, 100), order(3, 1, 100))
    assert not np.array_equal(order(3, 0, 100), order(4, 0, 100))


def test_every_epoch_draws_each_row_once():
    drawn = [prompt_index(7, number, 10) for number in range(30)]
    assert all(sorted(drawn[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert drawn[:10] != drawn[10:20]
    assert [prompt_index(7, number, 3, shuffle=False) for number in range(5)] == [0, 1, 2, 0, 1]


GOLDEN = [2, 4, 3, 6, 5, 0, 1, 7]  # a run that is resumed with another numpy must draw the same rows
