"""Probability ratios, for a token and for a sample."""

from __future__ import annotations

import torch

from postroad.config.algorithm import Level
from postroad_trainer.algorithms.segments import Segments

LOG_RATIO_BOUND = 20.0


def bounded_ratio(log_ratio_N: torch.Tensor) -> torch.Tensor:
    """exp(x) with x bounded to +-20, so that a broken token can't overflow. NaN stays NaN: it must not look like a 0."""
    return log_ratio_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def ratio_at(log_ratio_N: torch.Tensor, segments: Segments, level: Level) -> torch.Tensor:
    """[N] ratios of the tokens: own ("token"), of the whole sample ("sequence") or its mean per token ("geometric").

    exp(x_t); exp(sum over the sample's trained tokens of x); exp(their mean); the logarithm bounded to +-20. 1 at masked
    tokens. Differentiable through the sum.
    """
    if level == "token":
        return bounded_ratio(segments.masked(log_ratio_N))
    total_S = segments.sums(log_ratio_N) if level == "sequence" else segments.means(log_ratio_N)
    ratio_N = segments.spread(bounded_ratio(total_S))
    return torch.where(segments.mask_N, ratio_N, 1.0)
