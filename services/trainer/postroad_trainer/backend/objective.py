"""The loss of a micro-batch and the agreement metrics that come with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from postroad_trainer.algorithms import clipped_policy_loss, kl_k3, token_weights, truncated_importance_weights
from postroad_trainer.backend.layout import Tree
from postroad_trainer.backend.visibility import Layout
from postroad_trainer.batch import StepSettings, TrainRow

SUMS = ("loss", "trained", "abs_diff", "clipped", "tis", "entropy", "kl_k3")


@dataclass
class MicroBatch:
    """A micro-batch on the device: T positions, u of them predict, p predictions.

    tokens: int64 [1, T]. sources: int64 [u] positions; which: int64 [p] into sources; targets: int64 [p].
    row, place: numpy [p]. weight, advantage, engine: float32 [p], None where only log-probabilities are wanted.
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
    engine: torch.Tensor | None = None

    @staticmethod
    def of(trees: list[Tree], device: torch.device) -> MicroBatch:
        offsets = np.cumsum([0, *map(len, trees[:-1])])
        source = np.concatenate([tree.source + offset for tree, offset in zip(trees, offsets, strict=True)])
        sources, which = np.unique(source, return_inverse=True)
        experts = None
        if trees[0].experts is not None:
            experts = torch.from_numpy(np.concatenate([tree.experts for tree in trees]).astype(np.int64)).to(device)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

        return MicroBatch(
            layout=Layout.of(trees, device),
            tokens=put(np.concatenate([tree.tokens for tree in trees]))[None],
            sources=put(sources),
            which=put(which),
            targets=put(np.concatenate([tree.target for tree in trees])),
            row=np.concatenate([tree.row for tree in trees]),
            place=np.concatenate([tree.place for tree in trees]),
            experts=experts,
        )

    def weigh(self, rows: Sequence[TrainRow], settings: StepSettings) -> None:
        """Adds what the loss needs; the normaliser counts all rows of the batch, run or not."""
        counts = [int(row.loss_mask.sum()) for row in rows]
        weights = np.asarray(token_weights(counts, settings.reducer, settings.constant_length), np.float32)
        advantages = np.asarray([row.advantage for row in rows], np.float32)
        engine = np.asarray([rows[r].logprobs[t] for r, t in zip(self.row, self.place, strict=True)], np.float32)
        device = self.tokens.device
        self.weight = torch.from_numpy(weights[self.row]).to(device)
        self.advantage = torch.from_numpy(advantages[self.row]).to(device)
        self.engine = torch.from_numpy(engine).to(device)


@dataclass
class Objective:
    """loss: differentiable scalar. sums: float64 [len(SUMS)]. largest: float64 [1], the largest |difference|."""

    loss: torch.Tensor
    sums: torch.Tensor
    largest: torch.Tensor


def objective(batch: MicroBatch, current: torch.Tensor, entropy: torch.Tensor, settings: StepSettings) -> Objective:
    """Clipped policy loss with TIS at current [p]; entropy is [u]. One update per batch, so old = current, detached."""
    assert batch.weight is not None and batch.advantage is not None and batch.engine is not None
    old = current.detach()
    policy = clipped_policy_loss(current, old, batch.advantage, settings.clip_low, settings.clip_high)
    if settings.tis_cap is None:
        correction = torch.ones_like(old)
    else:
        correction = truncated_importance_weights(old, batch.engine, settings.tis_cap)
    loss = (batch.weight * correction * policy.loss_N).sum()
    difference = (old - batch.engine).abs()
    parts = (
        loss.detach(),
        torch.tensor(float(len(old))),
        difference.sum(),
        policy.clipped_N.sum(),
        correction.sum(),
        entropy[batch.which].sum(),
        kl_k3(batch.engine, old).sum(),
    )
    largest = difference.amax() if len(old) else torch.zeros(())
    return Objective(loss, torch.stack([part.double().to(loss.device) for part in parts]), largest.double().reshape(1))
