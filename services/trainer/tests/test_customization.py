"""docs/customization.md: its examples run as they are written, and what fails in them is named."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_parts import MIXED, groups_of, recipe_of

from postroad_trainer.ledger import Ledger, LedgerSettings, Member
from postroad_trainer.models.tiny import write_tiny_model
from postroad_trainer.plug_points import PlugPointError, plug_point
from postroad_trainer.training import Training

PAGE = (Path(__file__).parents[3] / "docs" / "customization.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The module of the page, importable; the page's trainer section."""
    (tmp_path / "my_project.py").write_text("\n".join(blocks("python")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    plug_point.cache_clear()
    write_tiny_model(tmp_path / "model", "llama")
    trainer: dict[str, Any] = yaml.safe_load(blocks("yaml")[0])["trainer"]
    return trainer


def test_the_examples_run_as_they_are_written(project: dict[str, Any], tmp_path: Path) -> None:
    import my_project

    called: set[str] = set()
    for name in [n for n in vars(my_project) if n in str(project)]:
        monitored = getattr(my_project, name)
        if callable(monitored) and getattr(monitored, "__module__", "") == "my_project":
            setattr(my_project, name, _noting(monitored, name, called))
    recipe = recipe_of(project)
    training = Training(recipe, tmp_path / "model")
    digest = training.digest()
    metrics, after = training.step(groups_of(MIXED), 3)
    assert after != digest and metrics["grad_norm"] > 0 and metrics["advantage_max"] == 0
    ledger = Ledger(LedgerSettings(1, 1, 2, 1, recipe.trainer.filter))
    while (assignment := ledger.next_assignment()) is not None:
        for member in range(2):
            ledger.add(Member(assignment.number, member, member, f"{assignment.number}.{member}", 0.0, 0))
    assert ledger.take_batch() is None and ledger.outstanding == 0  # dropped: nobody got a reward
    assert (
        plug_point("trainer.plug_points.after_save", recipe.trainer.plug_points.after_save)(tmp_path / "step-3", 3)
        is None
    )
    assert (tmp_path / "last-saved").read_text() == "3"
    named = set(re.findall(r"my_project\.(\w+)", blocks("yaml")[0]))
    assert called >= named, named - called


def _noting(function: Any, name: str, called: set[str]) -> Any:
    def note(*arguments: Any, **keywords: Any) -> Any:
        called.add(name)
        return function(*arguments, **keywords)

    return note


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("advantage", "def advantages(step, settings): raise ZeroDivisionError('no')"),
        ("loss", "def loss(scores, advantage_N, segments, settings): return 1 / 0"),
    ],
)
def test_an_exception_names_the_plug_point(project: dict[str, Any], tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "my_project.py").write_text("\n".join([*blocks("python"), text]))
    training = Training(recipe_of(project), tmp_path / "model")
    with pytest.raises(PlugPointError, match=rf"trainer\.algorithm\.{key}: my_project\.\w+ failed: ZeroDivisionError"):
        training.step(groups_of(MIXED), 3)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("my_project.nothing", "can't be found"),
        ("no_such.thing", "can't be found"),
        ("my_project.np", "not a function"),
    ],
)
def test_a_path_that_leads_nowhere_stops_the_start(
    project: dict[str, Any], tmp_path: Path, path: str, sentence: str
) -> None:
    project["algorithm"]["loss"] = path
    with pytest.raises(PlugPointError, match=rf"trainer\.algorithm\.loss: {path} .*{sentence}"):
        Training(recipe_of(project), tmp_path / "model")


def test_all_22_of_the_reference_are_mapped() -> None:
    table = PAGE[PAGE.index("## Coming from Miles") :]
    assert len(re.findall(r"^\| `--", table, re.MULTILINE)) >= 22
