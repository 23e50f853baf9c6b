"""Policy losses, per token and unreduced."""

from __future__ import annotations

from typing import NamedTuple

import torch

LOG_RATIO_BOUND = 20.0


class ClippedLoss(NamedTuple):
    """loss_N: differentiable in the current log-probabilities; clipped_N: bool, where the clipped branch was taken."""

    loss_N: torch.Tensor
    clipped_N: torch.Tensor


def clipped_policy_loss(
    current_N: torch.Tensor, old_N: torch.Tensor, advantage_N: torch.Tensor, clip_low: float, clip_high: float
) -> ClippedLoss:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = exp(current - old), all [N].

    Schulman et al. 2017 (PPO, arXiv:1707.06347, eq. 7); a clip_high above clip_low is DAPO's clip-higher
    (Yu et al. 2025, arXiv:2503.14476, eq. 10). The log ratio is bounded to +-20 against overflow.
    """
    ratio = (current_N - old_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    plain = -advantage_N * ratio
    clipped = -advantage_N * ratio.clamp(1 - clip_low, 1 + clip_high)
    return ClippedLoss(torch.maximum(plain, clipped), clipped > plain)
