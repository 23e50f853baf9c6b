"""The loss of a micro-batch and the agreement metrics that come with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from postroad.config.algorithm import AlgorithmSection
from postroad_trainer.algorithms import LogProbabilities, Segments, policy_objective, weights_of_step
from postroad_trainer.backend.layout import Tree
from postroad_trainer.backend.visibility import WHOLE, Layout, Stripe
from postroad_trainer.batch import StepSettings, TrainRow

SUMS = (
    "loss",
    "trained",
    "policy_loss",
    "clipped",
    "rejected",
    "ratio",
    "correction_weight",
    "kl_reference",
    "entropy",
)


@dataclass
class MicroBatch:
    """A micro-batch on the device: T positions, u of them predict, p predictions.

    tokens: int64 [1, T]. sources: int64 [u] positions; which: int64 [p] into sources; targets: int64 [p].
    row, place: numpy [p]. The last four are None where only log-probabilities are wanted: weight float64 [rows of the step],
    advantage float32 [p], scores and segments of the predictions (samples are numbered as the rows of the step).
    """

    layout: Layout
    tokens: torch.Tensor
    sources: torch.Tensor
    which: torch.Tensor
    targets: torch.Tensor
    row: np.ndarray
    place: np.ndarray
    experts: torch.Tensor | None
    weight: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    scores: LogProbabilities | None = None
    segments: Segments | None = None

    @staticmethod
    def of(trees: list[Tree], device: torch.device, stripe: Stripe = WHOLE) -> MicroBatch:
        offsets = np.cumsum([0, *map(len, trees[:-1])])
        source = np.concatenate([tree.source + offset for tree, offset in zip(trees, offsets, strict=True)])
        sources, which = np.unique(source, return_inverse=True)
        experts = None
        if trees[0].experts is not None:
            experts = torch.from_numpy(np.concatenate([tree.experts for tree in trees]).astype(np.int64)).to(device)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

        return MicroBatch(
            layout=Layout(trees, device, stripe),
            tokens=put(np.concatenate([tree.tokens for tree in trees]))[None],
            sources=put(sources),
            which=put(which),
            targets=put(np.concatenate([tree.target for tree in trees])),
            row=np.concatenate([tree.row for tree in trees]),
            place=np.concatenate([tree.place for tree in trees]),
            experts=experts,
        )


def weigh(batches: Sequence[MicroBatch], rows: Sequence[TrainRow], settings: StepSettings) -> None:
    """Adds to the micro-batches what the loss needs; the reducer's weights count all rows of the step, run or not."""
    device, names = batches[0].tokens.device, [row.execution or f"{row.group}/{row.sample_id}" for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    trained_S = torch.tensor([int(row.loss_mask.sum()) for row in rows])
    execution_S = torch.tensor([numbers[name] for name in names])
    weight = weights_of_step(settings.algorithm, trained_S, execution_S).to(device)

    def flat(arrays: Iterable[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(arrays)).astype(np.float32, copy=False))

    advantage = flat(np.broadcast_to(row.advantage, row.tokens.shape) for row in rows)
    scores = {"engine": flat(row.logprobs for row in rows)}
    scores |= {role: flat(row.scores[role] for row in rows) for role in rows[0].scores}
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
    for batch in batches:
        index = torch.from_numpy(starts[batch.row] + batch.place)
        batch.weight, batch.advantage = weight, advantage[index].to(device)
        batch.scores = LogProbabilities({role: score[index].to(device) for role, score in scores.items()})
        sample_N = torch.from_numpy(batch.row.astype(np.int64)).to(device)
        batch.segments = Segments(sample_N, torch.ones_like(sample_N, dtype=torch.bool), len(rows))


@dataclass
class Objective:
    """loss: differentiable scalar. sums: float64 [len(SUMS)]. scores: float32 [2, p], log-probability and entropy."""

    loss: torch.Tensor
    sums: torch.Tensor
    scores: torch.Tensor


def objective(batch: MicroBatch, current: torch.Tensor, entropy: torch.Tensor, settings: StepSettings) -> Objective:
    """The algorithm's loss at current [p]; entropy is [u]."""
    assert batch.weight is not None and batch.advantage is not None
    assert batch.scores is not None and batch.segments is not None
    scores, of_token = batch.scores.with_current(current), entropy[batch.which]
    result = policy_objective(settings.algorithm, scores, batch.advantage, batch.segments, batch.weight, of_token)
    sums = {"loss": result.loss.detach().double(), **result.sums}
    zero = torch.zeros((), dtype=torch.float64, device=current.device)
    kept = torch.stack([current.detach(), of_token.detach()])
    return Objective(result.loss, torch.stack([sums.get(name, zero) for name in SUMS]), kept)


def rows_to_run(rows: Sequence[TrainRow], algorithm: AlgorithmSection) -> list[tuple[int, TrainRow]]:
    """(index, row) of the rows that a term of the loss needs: an advantage of 0 leaves the divergence and the entropy."""
    everything = bool(algorithm.kl_loss_coefficient or algorithm.entropy_coefficient)
    everything |= "." in algorithm.loss or algorithm.loss == "value"
    return [
        (index, row)
        for index, row in enumerate(rows)
        if row.loss_mask.any() and (everything or np.broadcast_to(row.advantage, row.tokens.shape)[row.trained].any())
    ]


def scatter(rows: Sequence[TrainRow], batches: Sequence[MicroBatch], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """[k, tokens of all rows, one row behind the other] of the values [k, p] of each micro-batch; 0 elsewhere."""
    ends = np.cumsum([0, *(len(row.tokens) for row in rows)])
    flat = torch.zeros(len(values[0]), int(ends[-1]), device=values[0].device)
    for batch, value in zip(batches, values, strict=True):
        flat[:, torch.from_numpy(ends[batch.row] + batch.place).to(flat.device)] = value
    return flat


def by_row(rows: Sequence[TrainRow], flat: torch.Tensor) -> list[np.ndarray]:
    """What scatter put together, [k, T] of each row."""
    return np.split(flat.cpu().numpy(), np.cumsum([len(row.tokens) for row in rows])[:-1], axis=1)


def scores_of_run(
    rows: Sequence[TrainRow], active: Sequence[tuple[int, TrainRow]], flat: torch.Tensor
) -> dict[str, Any]:
    """StepResult's scores, and what they say of engine and trainer; flat [2, tokens of all rows]."""
    whole, run = by_row(rows, flat), {index for index, _ in active}
    difference = np.concatenate([np.abs(whole[index][0] - row.logprobs)[row.trained] for index, row in active])
    entropy = np.concatenate([whole[index][1][row.trained] for index, row in active])
    return {
        "scores": [score if index in run else None for index, score in enumerate(whole)],
        "logprob_abs_diff_mean": float(difference.mean(dtype=np.float64)),
        "logprob_abs_diff_max": float(difference.max()),
        "entropy": float(entropy.mean(dtype=np.float64)),
    }
