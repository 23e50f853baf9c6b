"""The budgets of docs/design.md: what is small can be read in a weekend."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("shared", "services")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "tests" not in path.parts and "build" not in path.parts
]
ALLOWED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["postroad"]["budgets"]
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 6


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    if name_of(path) not in ALLOWED["files"]:
        assert text.count("\n") <= FILE_LINES, "is this two ideas?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if f"{name_of(path)}:{node.name}" in ALLOWED["functions"]:
                continue
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{node.name} is too long"
            positional = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            assert len(positional) <= PARAMETERS, f"{node.name} has {len(positional)} parameters"


def test_the_whole_is_small():
    assert sum(path.read_text().count("\n") for path in SOURCES) <= ALLOWED["total_lines"]


def test_no_drawer_for_everything():
    assert not [name_of(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc")]
