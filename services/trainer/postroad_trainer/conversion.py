"""From the graded samples of a batch to rows with advantages. Everything here is the same on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from postroad.config import Recipe
from postroad.config.algorithm import AlgorithmSection
from postroad.messages import Sample
from postroad_trainer.algorithms import LogProbabilities, Rewarded, Segments, advantages_of_step, generalised
from postroad_trainer.algorithms.dapo import overlong_penalty
from postroad_trainer.batch import TrainRow

Groups = Sequence[Sequence[Sample]]


def rows_of(groups: Groups) -> list[TrainRow]:
    """A row for each sample, in the batch's order, its advantage still 0."""
    return [_row(sample) for samples in groups for sample in samples]


def _row(sample: Sample) -> TrainRow:
    trajectory, teacher = sample.trajectory, sample.teacher_log_probabilities
    return TrainRow(
        sample_id=sample.id,
        group=sample.group,
        tokens=trajectory.tokens,
        loss_mask=trajectory.loss_mask,
        logprobs=trajectory.log_probabilities,
        advantage=0.0,
        routed_experts=trajectory.routed_experts,
        scores={} if teacher is None else {"teacher": teacher},
        execution=f"{sample.group}/{trajectory.execution}" if trajectory.execution else "",
    )


def without(rows: Sequence[TrainRow], kept: Sequence[bool]) -> list[TrainRow]:
    """The rows with nothing trained where `kept` is False; their rewards still count in the mean of their group."""
    return [
        row if keep else dataclasses.replace(row, loss_mask=np.zeros_like(row.loss_mask))
        for row, keep in zip(rows, kept, strict=True)
    ]


def shaped_rewards(groups: Groups, recipe: Recipe) -> list[float]:
    """The rewards in the batch's order, lowered for responses that come near the limit (trainer.algorithm.overlong_*)."""
    samples = [sample for members in groups for sample in members]
    rewards = [sample.reward for sample in samples]
    algorithm = recipe.trainer.algorithm
    if algorithm.overlong_buffer is None:
        return rewards
    lengths = torch.tensor([int(sample.trajectory.loss_mask.sum()) for sample in samples])
    longest = recipe.rollout.sampling.max_new_tokens
    penalties = overlong_penalty(lengths, longest, algorithm.overlong_buffer, algorithm.overlong_factor)
    return [reward + penalty for reward, penalty in zip(rewards, penalties.tolist(), strict=True)]


def with_advantages(rows: Sequence[TrainRow], rewards: Sequence[float], algorithm: AlgorithmSection) -> list[TrainRow]:
    """The rows with the advantage of every trained token. Raises AlgorithmError for rewards or scores that have none."""
    return _with(rows, rewards, lambda step: advantages_of_step(algorithm, step))


def with_returns(rows: Sequence[TrainRow], rewards: Sequence[float], algorithm: AlgorithmSection) -> list[TrainRow]:
    """What the critic learns: the rows with the return of every trained token in the place of its advantage."""
    return _with(rows, rewards, lambda step: generalised(step, algorithm).return_N)


def _with(
    rows: Sequence[TrainRow], rewards: Sequence[float], of_step: Callable[[Rewarded], torch.Tensor]
) -> list[TrainRow]:
    if not any(row.loss_mask.any() for row in rows):
        return list(rows)
    starts = [int(np.argmax(row.trained)) if row.loss_mask.any() else len(row.tokens) for row in rows]
    responses = [slice(start, None) for start in starts]

    def packed(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([a[part] for a, part in zip(arrays, responses, strict=True)]))

    lengths = [len(row.tokens) - start for row, start in zip(rows, starts, strict=True)]
    roles = {"engine": packed([row.logprobs for row in rows])}
    roles |= {role: packed([row.scores[role] for row in rows]) for role in rows[0].scores}
    rewarded = Rewarded(
        torch.tensor(rewards, dtype=torch.float64),
        _numbered([row.group for row in rows]),
        _numbered([row.execution or f"{row.group}/{row.sample_id}" for row in rows]),
        Segments.of_lengths(lengths, packed([row.trained for row in rows])),
        LogProbabilities(roles),  # type: ignore[arg-type]
    )
    parts = np.split(of_step(rewarded).numpy(), np.cumsum(lengths)[:-1])
    return [
        dataclasses.replace(row, advantage=np.concatenate([np.zeros(start, np.float32), part]))
        for row, start, part in zip(rows, starts, parts, strict=True)
    ]


def _numbered(names: Sequence[str]) -> torch.Tensor:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])
