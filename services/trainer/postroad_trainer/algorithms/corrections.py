"""Corrections for the gap between the engine that sampled and the trainer that learns."""

from __future__ import annotations

import torch

LOG_RATIO_BOUND = 20.0


def truncated_importance_weights(old_N: torch.Tensor, engine_N: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance sampling: w = min(exp(old - engine), cap), per token, detached.

    old: the trainer's own log-probabilities with the weights before the step; engine: those recorded while
    sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; truncation
    after Ionides 2008). The log ratio is bounded to +-20 first so that a broken token can't overflow.
    """
    log_ratio = (old_N - engine_N).detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio.exp().clamp(max=cap)
