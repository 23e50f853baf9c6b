"""The agents' recipes through the whole mesh, with the real sandbox and the real retriever.

A tiny model learns the tags from given conversations first (as ReTool does), so that it has something to call with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import Mesh

SMALL = ("model.dtype=float32", "evaluation=[]", "trainer.steps=2", "trainer.groups_per_step=2", "trainer.learning_rate=1e-4",
         "rollout.sampling.max_new_tokens=40", "trainer.freeze_embedding=false")  # fmt: skip
TALKS = {
    "run": ["<code>print(6*7)", "<interpreter>\n42\n</interpreter>", "42"],
    "look": ["<search>tea", "<information>\nDoc 1(Title: Tea) It is green.\n</information>", "<answer>green</answer>"],
}


def rows(folder: Path) -> str:
    """The data of a run: one prompt that wants the tool, and its label."""
    for name, label in (("run", "42"), ("look", "green")):
        row = json.dumps({"prompt": name, "label": label})
        (folder / f"{name}.jsonl").write_text("\n".join([row] * 8))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, mesh_in: Callable[[Path], Mesh]) -> str:
    """A tiny model that has learned to call both tools."""
    folder = tmp_path_factory.mktemp("cold-start")
    talks = []
    for asked, said in TALKS.items():
        closing = {"run": "</code>", "look": "</search>"}[asked]
        roles = ("assistant", "user", "assistant")
        contents = [said[0] + closing, *said[1:]]
        talks.append({"messages": [{"role": "user", "content": asked},
                                   *({"role": r, "content": c} for r, c in zip(roles, contents, strict=True))]})  # fmt: skip
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks * 128)))
    data = {"kind": "file", "path": str(folder / "talks.jsonl"), "prompt_key": "messages"}
    mesh = mesh_in(folder / "run")
    try:
        mesh.up("sft", "model.bundled=tiny-llama", "model.dtype=float32", f"data={json.dumps(data)}", "evaluation=[]",
                "trainer.steps=60", "trainer.groups_per_step=4", "trainer.learning_rate=4e-3", "trainer.checkpoint.every=60",
                "trainer.freeze_embedding=false")  # fmt: skip
        mesh.wait_finished()
    finally:
        mesh.down()
    return str(folder / "run" / "model")


def attempts(mesh: Mesh, count: int) -> list[dict[str, Any]]:
    """The first samples of the first group."""
    return [mesh.json("sample", f"g00000000.{member}") for member in range(count)]


def run(mesh: Mesh, recipe: str, *settings: str) -> None:
    mesh.up(recipe, *SMALL, *settings)
    mesh.wait_finished()
    mesh.nothing_lost()
    assert all(line["equal"] for line in mesh.lines("replay", "--steps", "1:2"))


def test_retool_runs_code_and_trains_what_the_model_wrote(mesh: Mesh, model: str, tmp_path: Path) -> None:
    data = {"kind": "file", "path": f"{rows(tmp_path)}/run.jsonl"}
    run(mesh, "retool", f'model={{"path": "{model}"}}', f"data={json.dumps(data)}", "reward={grader: exact}")
    samples = attempts(mesh, 3)
    called = [sample for sample in samples if sample["messages"][-2]["content"] == "<interpreter>\n42\n</interpreter>"]
    assert called, samples
    assert max(sample["reward"] for sample in called) == 1
    for sample in called:
        assert len(sample["mask"]) == sum(message["role"] == "assistant" for message in sample["messages"])
        assert sample["trained_tokens"] < sample["tokens"] - len("<interpreter>\n42\n</interpreter>")


def test_search_r1_finds_documents(mesh: Mesh, model: str, tmp_path: Path) -> None:
    data = {"kind": "file", "path": f"{rows(tmp_path)}/look.jsonl"}
    (tmp_path / "corpus.jsonl").write_text('{"contents": "Tea\\nIt is green."}\n')
    tools = [{"kind": "search", "corpus": str(tmp_path / "corpus.jsonl")}]
    run(mesh, "search-r1", f'model={{"path": "{model}"}}', f"data={json.dumps(data)}", f"tools={json.dumps(tools)}")
    found = [s for s in attempts(mesh, 3) if "Doc 1(Title: Tea) It is green." in str(s["messages"])]
    assert found and max(sample["reward"] for sample in found) == 1


def test_a_team_has_rewards_of_its_own(mesh: Mesh) -> None:
    run(
        mesh,
        "multi-agent",
        'model={"bundled": "tiny-llama"}',
        "rollout.sampling.max_new_tokens=12",
        "rollout.group_size=5",
    )
    solver, _, rewriter, _, selector = attempts(mesh, 5)
    assert "Solution 1:" in rewriter["messages"][-2]["content"] and "Judgment" in selector["messages"][-2]["content"]
    assert solver["messages"][-1]["content"].strip() in rewriter["messages"][-2]["content"]


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("retool", "tools=[{kind: pyton}]", "'python', 'search'"),
        ("search-r1", "tools.0.corpus=none.jsonl", "there is no corpus"),
        ("retool", "tools=[{kind: function, path: a.b}]", "no function a.b"),
    ],
)  # fmt: skip
def test_recipe_check_tells_bad_tools(mesh: Mesh, recipe: str, override: str, message: str) -> None:
    text = f"{recipe}.yaml"
    mesh.command("recipe", "check", f"recipes/{text}")
    with pytest.raises(AssertionError, match=message):
        mesh.command("recipe", "check", f"recipes/{text}", "--set", override)
