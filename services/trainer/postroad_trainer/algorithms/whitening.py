"""Whitening over all trained tokens of a step, wherever they are."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import NotFiniteError, NothingTrainedError
from postroad_trainer.algorithms.segments import Reduce, alone

EPSILON = 1e-8


def whiten(x_N: torch.Tensor, mask_N: torch.Tensor, reduce: Reduce = alone) -> torch.Tensor:
    """(x - mean) / sqrt(var + 1e-8) [N] with mean and unbiased (n - 1) variance of the trained tokens of all ranks.

    Hu et al. 2025, REINFORCE++, arXiv:2501.03262 (global advantage normalisation).
    reduce sums over the DP x CP group, whose ranks hold disjoint tokens. It is a collective and called twice on
    every rank, also on one without a trained token. Two passes in float64: no loss of precision where |mean| >> std.
    The map is applied to masked positions too; one that is not finite there becomes the mean's image.
    One trained token in all: 0. Raises on all ranks alike: NothingTrainedError where no rank has a trained token,
    NotFiniteError where any rank has one that is not finite.
    """
    x = torch.where(mask_N, x_N, 0.0).double()
    total, count = reduce(torch.stack([x.sum(), mask_N.sum().double()]))
    if count == 0:
        raise NothingTrainedError("no token of the step is trained, so advantages can't be whitened; skip the step")
    mean = total / count
    if not torch.isfinite(mean):
        raise NotFiniteError(
            "an advantage is not finite; look for it in rewards, values or KL of the samples of this step"
        )
    squares = reduce(torch.where(mask_N, x - mean, 0.0).square().sum()[None])[0]
    scale = (squares / (count - 1).clamp(min=1) + EPSILON).rsqrt()
    everywhere = torch.where(mask_N | torch.isfinite(x_N), x_N.double(), mean)
    return ((everywhere - mean) * scale).to(x_N.dtype)
