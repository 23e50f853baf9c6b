"""Recipes: every recipe of the repository loads; faults name the key and the nearest valid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from postroad.config import RecipeError, load_recipe, resolved_yaml
from postroad.config.reference import reference

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_same_after_being_resolved(path, tmp_path):
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(resolved_yaml(recipe))
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.lerning_rate=1", "unknown key trainer.lerning_rate: did you mean 'learning_rate'"),
        ("rollout.engine.slotz=1", "unknown key rollout.engine.slotz: did you mean 'slots'"),
        ("trainer.steps=many", "trainer.steps: .*integer"),
        ("trainer.algorithm.reducer=tokens", "trainer.algorithm.reducer: .*did you mean 'token'"),
        ("model.path=x", "exactly one of model.path and model.bundled"),
        ("rollout.sampling.temperature=0", "all members of a group equal"),
        ("rollout.sampling.max_new_tokens=5000", "no room for a prompt"),
        ("trainer.parallel.tensor=2", "make it a multiple of 2"),
        ("trainer.steps.a=1", "below a plain value"),
        ("steps", "not of the form"),
    ],
)
def test_a_fault_is_named_with_its_remedy(override, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe(RECIPES[0].with_name("tiny.yaml"), [override])


def test_overrides_reach_nested_keys_and_lists():
    recipe = load_recipe(RECIPES[0].with_name("demo.yaml"), ["trainer.steps=3", "evaluation.0.rows=5"])
    assert (recipe.trainer.steps, recipe.evaluation[0].rows) == (3, 5)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00"])
def test_what_is_no_recipe_is_refused(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "recipe.md"
    assert page.read_text() == reference(), "run `postroad recipe reference > docs/recipe.md`"
