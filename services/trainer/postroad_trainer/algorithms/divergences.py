"""Estimators of the Kullback-Leibler divergence from samples."""

from __future__ import annotations

import torch


def kl_k3(sampler_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """KL(sampler || other) per token: k3 = exp(-d) + d - 1 with d = sampler - other, never negative.

    The samples must come from `sampler` (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    difference = sampler_N - other_N
    return torch.expm1(-difference) + difference
