"""What group number k asks for: a function of the recipe, the data and k (but for the deadline), so that a restart asks
for the same."""

from __future__ import annotations

import hashlib
import time

from postroad.config import Recipe
from postroad.config.recipe import EvaluationSection, SamplingSection
from postroad.messages import EngineFeatures, RewardSpec, Sampling, Task
from postroad_trainer.data import Dataset, Row, prompt_index


def group_name(number: int) -> str:
    return f"g{number:08d}"


def group_number(name: str) -> int | None:
    """The number of a training group; None for another group."""
    return int(name[1:]) if name.startswith("g") and name[1:].isdigit() else None


def evaluation_group(version: int, name: str, row: int) -> str:
    return f"e{version:08d}-{name}-{row}"


def train_task(recipe: Recipe, run: str, data: Dataset, number: int, minimum_version: int) -> Task:
    row = data.row(prompt_index(recipe.seed, number, len(data), shuffle=recipe.data.shuffle))
    return Task(
        run=run,
        id=group_name(number),
        purpose="train",
        prompt=row.prompt,
        members=recipe.group_size,
        sampling=_sampling(recipe.rollout.sampling, _seed(recipe.seed, group_name(number))),
        agent=recipe.rollout.agent,
        reward=_reward(recipe, row),
        features=EngineFeatures(routed_experts=recipe.rollout.routed_experts),
        row=row.id,
        deadline=time.time() + recipe.rollout.deadline_s,
        minimum_version=minimum_version,
    )


def evaluation_task(
    recipe: Recipe, run: str, evaluation: EvaluationSection, row: Row, group: str, version: int
) -> Task:
    return Task(
        run=run,
        id=group,
        purpose="eval",
        prompt=row.prompt,
        members=1,
        sampling=_sampling(evaluation.sampling, _seed(recipe.seed, group)),
        agent=recipe.rollout.agent,
        reward=_reward(recipe, row),
        row=row.id,
        deadline=time.time() + recipe.rollout.deadline_s,
        minimum_version=version,
    )


def _sampling(section: SamplingSection, seed: int) -> Sampling:
    values = section.model_dump()
    return Sampling(**{**values, "stop": tuple(values["stop"])}, seed=seed)


def _seed(seed: int, group: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=4).digest()) >> 2


def _reward(recipe: Recipe, row: Row) -> RewardSpec:
    return RewardSpec(
        grader=recipe.reward.grader, settings=recipe.reward.settings, label=row.label, metadata=row.metadata
    )
