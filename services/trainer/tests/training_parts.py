"""Samples and recipes of the tests of a whole step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from postroad.config import Recipe
from postroad.messages import RewardSpec, Sample, Sampling, Task, Trajectory, VersionSpan


def recipe_of(trainer: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe of a tiny model with this trainer section."""
    return Recipe.model_validate(
        {
            "model": {"bundled": "tiny-llama", "dtype": "float32"},
            "data": {"kind": "class", "path": "x.y"},
            "reward": {"grader": "exact"},
            "rollout": {"sampling": {"max_new_tokens": 8}, "group_size": 4},
            **sections,
            "trainer": {"steps": 4, "groups_per_step": 2, "learning_rate": 1e-3, **(trainer or {})},
        }
    )


def sample_of(group: int, member: int, reward: float, seed: int = 0, **trajectory: Any) -> Sample:
    """Prompt and response of random letters; the engine's scores are a guess, its version is 2."""
    random = np.random.default_rng([seed, group, member])
    prompt = np.random.default_rng([seed, group]).integers(5, 90, 6)
    tokens = np.concatenate([prompt, random.integers(5, 90, int(random.integers(3, 8)))]).astype(np.int32)
    mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
    name = f"g{group:08d}"
    task = Task(
        run="run", id=name, prompt=[{"role": "user", "content": "?"}], members=4, sampling=Sampling(), row=str(group),
        reward=RewardSpec(grader="exact", metadata={"source": f"book{group % 2}"}), deadline=0.0,
    )  # fmt: skip
    values = {
        "tokens": tokens, "loss_mask": mask, "finish_reason": "stop", "engine": "engine-0", "messages": [],
        "log_probabilities": np.where(mask, random.normal(-4.5, 0.3, len(tokens)), 0).astype(np.float32),
        "versions": [VersionSpan(start=0, end=len(tokens), version=2)],
    }  # fmt: skip
    made = Trajectory(run="run", id=f"{name}.{member}", member=member, task=task, **{**values, **trajectory})
    return Sample(run="run", id=made.id, trajectory=made, reward=reward)


def groups_of(rewards: list[list[float]], seed: int = 0) -> list[list[Sample]]:
    return [
        [sample_of(group, member, reward, seed) for member, reward in enumerate(members)]
        for group, members in enumerate(rewards)
    ]


MIXED = [[1.0, 0.0, 0.5, 0.1], [0.2, 0.3, 0.9, 0.1]]  # none is the mean of its group


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
