"""Estimators of the Kullback-Leibler divergence from samples: for the loss, for the reward, and as metrics."""

from __future__ import annotations

from typing import get_args

import torch

from postroad.config.algorithm import DivergenceKind
from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.ratios import LOG_RATIO_BOUND, bounded_ratio

LOW_VARIANCE_BOUND = 10.0


def kl_k1(sampler_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """KL(sampler || other) per token: k1 = d = sampler - other. Unbiased, of high variance, of both signs.

    Schulman 2020, http://joschu.net/blog/kl-approx.html. As a loss its expected gradient is 0: use it in the reward.
    """
    return sampler_N - other_N


def kl_k2(sampler_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """k2 = d^2 / 2 (Schulman 2020): biased, but on policy its gradient is an unbiased gradient of the divergence."""
    return (sampler_N - other_N).square() / 2


def kl_k3(sampler_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """KL(sampler || other) per token: k3 = exp(-d) + d - 1 with d = sampler - other, never negative.

    The samples must come from `sampler` (Schulman 2020, http://joschu.net/blog/kl-approx.html). Overflows where the
    sampler's probability is astronomically smaller than the other's; "low_variance" does not.
    """
    difference = sampler_N - other_N
    return torch.expm1(-difference) + difference


def kl_estimate(
    sampler_N: torch.Tensor,
    other_N: torch.Tensor,
    kind: DivergenceKind,
    importance_log_ratio_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(sampler || other) per token by one of the estimators, [N].

    low_variance: k3 with -d bounded to +-20 and the result to [-10, 10], where the gradient is 0.
    importance_log_ratio_N = current - old, with its gradient: tokens were drawn by old, so the estimate is multiplied by
    exp(current - old) before the last bound, which makes value and gradient unbiased off policy
    (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556, §3.1 "Unbiased KL Estimate").
    """
    if kind not in get_args(DivergenceKind):
        raise AlgorithmError(f"the KL estimator is {kind!r}; one of {', '.join(get_args(DivergenceKind))} expected")
    if kind == "k1":
        value = kl_k1(sampler_N, other_N)
    elif kind == "k2":
        value = kl_k2(sampler_N, other_N)
    elif kind == "k3":
        value = kl_k3(sampler_N, other_N)
    else:
        negative = (other_N - sampler_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        value = torch.expm1(negative) - negative
    if importance_log_ratio_N is not None:
        value = bounded_ratio(importance_log_ratio_N) * value
    return value.clamp(-LOW_VARIANCE_BOUND, LOW_VARIANCE_BOUND) if kind == "low_variance" else value
