"""Rows of files: .jsonl, .parquet, .arrow, or a Hugging Face data set folder with any of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from postroad_trainer.data.dataset import DataError
from postroad_trainer.data.rows import Raw

SUFFIXES = (".jsonl", ".parquet", ".arrow")


def read_rows(path: Path, columns: Iterable[str]) -> list[Raw]:
    """All rows of the file or folder, in order. Only `columns` are read where the format allows it."""
    files = find_files(path)
    wanted, rows = set(columns), []
    for file in files:
        name = str(file.relative_to(path)) if file != path else file.name
        prefix = f"{name}:" if len(files) > 1 else ""
        source = _jsonl(file, name, prefix) if file.suffix == ".jsonl" else _table(file, name, prefix, wanted)
        rows.extend(source)
    return rows


def find_files(path: Path) -> list[Path]:
    """The files that hold the rows, in order. Raises DataError where that is not clear."""
    if not path.exists():
        raise DataError(f"data.path {path} does not exist")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"data.path {path} has the ending {path.suffix!r}; known: {', '.join(SUFFIXES)}, or a folder"
            )
        return [path]
    if (path / "dataset_dict.json").exists():
        return _saved(path / _split(path, _json(path / "dataset_dict.json").get("splits", [])))
    if (path / "state.json").exists():
        return _saved(path)
    return _loose(path)


def _split(path: Path, splits: list[str]) -> str:
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataError(f"{path} holds the splits {', '.join(splits)}: point data.path to the folder of one of them")


def _saved(path: Path) -> list[Path]:
    """The files of a data set that was saved by save_to_disk."""
    state = _json(path / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{path} is a selection of rows: call flatten_indices() before save_to_disk()")
    files = [path / entry["filename"] for entry in state.get("_data_files", [])]
    if not files:
        raise DataError(f"{path}/state.json names no data files: save the data set again")
    return files


def _loose(path: Path) -> list[Path]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    train = [file for file in files if any(part.startswith("train") for part in file.relative_to(path).parts)]
    files = train or files
    if not files:
        raise DataError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    if len({file.suffix for file in files}) > 1:
        raise DataError(f"{path} holds files of several formats, such as {files[0].name} and {files[-1].name}: point "
                        "data.path to one of them")  # fmt: skip
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _jsonl(file: Path, name: str, prefix: str) -> Iterator[Raw]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            identity, place = f"{prefix}{number}", f"{name} line {number}"
            try:
                yield Raw(identity, place, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Raw(identity, place, fault=f"not JSON: {error}")


def _table(file: Path, name: str, prefix: str, wanted: set[str]) -> Iterator[Raw]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{file} needs pyarrow: pip install 'postroad-trainer[parquet]'") from error
    try:
        if file.suffix == ".parquet":
            present = [column for column in parquet.read_schema(file).names if column in wanted]
            table = parquet.ParquetFile(file).read(columns=present)
        else:
            table = _arrow_table(arrow, file)
            table = table.select([column for column in table.column_names if column in wanted])
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file} can't be read: {error}") from error
    number = 0
    for batch in table.to_batches(max_chunksize=4096):
        for value in batch.to_pylist():
            number += 1
            yield Raw(f"{prefix}{number}", f"{name} row {number}", value)


def _arrow_table(arrow: Any, file: Path) -> Any:
    """Hugging Face writes the stream format; other tools write the file format."""
    with arrow.memory_map(str(file)) as source:
        try:
            return arrow.ipc.open_stream(source).read_all()
        except arrow.ArrowInvalid:
            source.seek(0)
            return arrow.ipc.open_file(source).read_all()
