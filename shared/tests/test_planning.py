"""`postroad recipe plan`: parameter counts against the published models', and layouts against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postroad.command.planning import estimate
from postroad.config import RecipeError, load_recipe
from postroad.config.shapes import tensors_of

RECIPES = Path(__file__).parents[2] / "recipes"
PARAMETERS = {"qwen3-4b": 4_022_468_096, "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560}


def model_of(name: str) -> dict[str, Any]:
    return json.loads((RECIPES / "models" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PARAMETERS)
def test_counts_are_those_of_the_published_models(name: str) -> None:
    found = estimate(load_recipe(RECIPES / f"{name}.yaml"), model_of(name))
    assert found.parameters == PARAMETERS[name]
    assert found.fullest_source_share < 0.3 and found.sources <= load_recipe(RECIPES / f"{name}.yaml").trainer.processes


def test_one_rank_holds_and_reads_the_whole_model() -> None:
    recipe = load_recipe(RECIPES / "qwen3-4b.yaml", ["trainer.processes=1", "trainer.parallel={}"])
    found = estimate(recipe, model_of("qwen3-4b"))
    assert found.trainer_rank_bytes == 18 * found.parameters  # 2 weights + 4 gradients + 4 masters + 8 moments
    assert found.read_bytes == 2 * found.parameters and found.engine_rank_bytes == 4 * found.parameters
    assert found.sources == 1


def test_an_engine_rank_reads_its_shard_alone() -> None:
    model = model_of("qwen3-4b")
    whole = estimate(load_recipe(RECIPES / "qwen3-4b.yaml"), model)
    recipe = load_recipe(RECIPES / "qwen3-4b.yaml", ["rollout.engine.sglang.options={tp-size: 4}"])
    quarter = estimate(recipe, model)
    copies = sum(2 * tensor.shape[0] for tensor in tensors_of(model) if tensor.split is None)
    assert quarter.read_bytes == (whole.read_bytes - copies) // 4 + copies


def test_a_layout_that_does_not_divide_the_model_is_refused() -> None:
    settings = ["trainer.processes=5", "trainer.parallel={pipeline: 5}", "trainer.groups_per_step=5"]
    with pytest.raises(RecipeError, match="36 layers over pipeline stages"):
        estimate(load_recipe(RECIPES / "qwen3-4b.yaml", settings), model_of("qwen3-4b"))
