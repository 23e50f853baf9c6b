"""What the backend tests share: tiny model folders, rows, and readings that the verbs do not give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from postroad.config.parallel import ParallelSection
from postroad_trainer.backend import BackendSettings, MegatronBackend
from postroad_trainer.backend.layout import Tree
from postroad_trainer.backend.visibility import Layout
from postroad_trainer.batch import StepSettings, TrainRow
from postroad_trainer.models.tiny import write_tiny_model

FROZEN_STEP = StepSettings(learning_rate=0.0, grad_clip=0.0)


def model_folder(tmp_path: Path, kind: Any = "llama", seed: int = 0, **changes: Any) -> Path:
    folder = tmp_path / "-".join([kind, str(seed), *changes])
    if not folder.exists():
        write_tiny_model(folder, kind, seed, changes)
    return folder


def backend(folder: Path, parallel: dict[str, Any] | None = None, **settings: Any) -> MegatronBackend:
    layout = ParallelSection(**(parallel or {}))
    return MegatronBackend(
        BackendSettings(**{"model_path": folder, "dtype": "float32", "parallel": layout, **settings})
    )


def make_rows(
    groups: int = 3, members: int = 4, seed: int = 0, experts: tuple[int, int, int] | None = None
) -> list[TrainRow]:
    """Groups with a common prompt; ragged responses, one of them with an untrained stretch in its middle.

    experts: (layers, topk, number of experts) of random recorded routing, equal on the prompts of a group.
    """
    random = np.random.default_rng(seed)

    def routing(length: int) -> np.ndarray:
        layers, topk, count = experts or (0, 0, 1)
        return np.argsort(random.random((length, layers, count)), -1)[..., :topk].astype(np.uint8)

    rows = []
    for group in range(groups):
        prompt = random.integers(3, 90, 5 + 3 * group)
        of_prompt = routing(len(prompt))
        for member in range(members):
            response = random.integers(3, 90, int(random.integers(1, 9)))
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
            if member == 1 and len(response) > 3:
                mask[len(prompt) + 1 : len(prompt) + 3] = 0
            routed = np.concatenate([of_prompt, routing(len(response) - 1)]) if experts else None
            logprobs = np.where(mask, random.normal(-4.5, 0.4, len(tokens)), 0).astype(np.float32)
            rows.append(
                TrainRow(f"{group}/{member}", f"g{group}", tokens, mask, logprobs, float(random.normal()), routed)
            )
    return rows


def by_name(trained: MegatronBackend, attribute: str = "main_grad") -> dict[str, torch.Tensor]:
    """An attribute of every trained parameter, under the Hugging Face names (on the ranks of a model, its parts)."""
    found = {}
    for entry in trained._state.entries:
        if entry.parameter.requires_grad and not entry.copy:
            parts = trained._built.mapping.split(entry, getattr(entry.parameter, attribute))
            found |= {name: part.clone() for name, part in zip(entry.names, parts, strict=True)}
    return found


def logits_of(trained: MegatronBackend, tokens: np.ndarray) -> torch.Tensor:
    """All logits [T, V] of one sequence."""
    length, none = len(tokens), np.zeros(0, np.int64)
    tree = Tree(tokens.astype(np.int64), np.arange(length), np.ones(length, np.int64), none, none, none, none, None)
    with torch.no_grad(), trained._running():
        number = trained._built.table.add(Layout([tree], torch.device("cpu")))
        logits = trained._chunks[0](torch.from_numpy(tree.tokens)[None], None, number)
        trained._built.table.clear()
    return logits[0].float()


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max()) for name in left)
