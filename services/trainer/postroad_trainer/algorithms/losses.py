"""Policy losses, per token and unreduced."""

from __future__ import annotations

from typing import NamedTuple

import torch

from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.ratios import bounded_ratio, ratio_at
from postroad_trainer.algorithms.segments import Segments


class ClippedLoss(NamedTuple):
    """loss_N: differentiable in the current log-probabilities; clipped_N: bool, where the clipped branch was taken."""

    loss_N: torch.Tensor
    clipped_N: torch.Tensor


def clipped_policy_loss(
    current_N: torch.Tensor,
    old_N: torch.Tensor,
    advantage_N: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> ClippedLoss:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = exp(current - old), all [N].

    Schulman et al. 2017 (PPO, arXiv:1707.06347, eq. 7); a clip_high above clip_low is DAPO's clip-higher
    (Yu et al. 2025, arXiv:2503.14476, eq. 10). dual_clip c > 1 bounds the loss of bad tokens: min(loss, -c A) where A < 0
    (Ye et al. 2020, arXiv:1912.09729, §"Dual-clip PPO"); it is not counted in clipped_N.
    The log ratio is bounded to +-20 against overflow. NaN gives NaN, which the step's gradient check sees.
    """
    return _clip(bounded_ratio(current_N - old_N), advantage_N, clip_low, clip_high, dual_clip)


def sequence_policy_loss(
    current_N: torch.Tensor,
    old_N: torch.Tensor,
    advantage_N: torch.Tensor,
    segments: Segments,
    clip_low: float,
    clip_high: float,
) -> ClippedLoss:
    """GSPO: the clipped loss with one ratio for all tokens of a sample, s = exp(mean over tokens of (current - old)).

    Zheng et al. 2025, arXiv:2507.18071, eq. 5-7; the gradient flows through the mean. Clips are tiny here (3e-4 / 4e-4 in
    the paper). Masked tokens neither enter the mean nor have a loss. With context parallelism segments.reduce must be
    differentiable.
    """
    advantage_N = segments.masked(advantage_N)
    loss = _clip(ratio_at(current_N - old_N, segments, "geometric"), advantage_N, clip_low, clip_high, None)
    return ClippedLoss(segments.masked(loss.loss_N), loss.clipped_N)


def clipped_weight_loss(
    current_N: torch.Tensor, old_N: torch.Tensor, advantage_N: torch.Tensor, clip_low: float | None, clip_high: float
) -> ClippedLoss:
    """CISPO: -sg(clip(r, 1 - clip_low, 1 + clip_high)) A current, with r = exp(current - old), all [N].

    MiniMax 2025 (M1), arXiv:2506.13585, eq. 4-5. The weight is clipped, not the update: every token keeps a gradient.
    clip_low None: no lower bound, as in the paper. clipped_N: where the weight was clipped.
    """
    _require_clips(clip_low or 0.0, clip_high)
    ratio = bounded_ratio(current_N - old_N).detach()
    weight = ratio.clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return ClippedLoss(-weight * advantage_N * current_N, weight != ratio)


def weighted_loss(current_N: torch.Tensor, advantage_N: torch.Tensor) -> ClippedLoss:
    """-A log p, [N], without a ratio: supervised fine-tuning with A = 1, preferences with theirs (Williams 1992)."""
    return ClippedLoss(-advantage_N * current_N, torch.zeros_like(current_N, dtype=torch.bool))


def _clip(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> ClippedLoss:
    _require_clips(clip_low, clip_high)
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        if not dual_clip > 1:
            raise AlgorithmError(f"dual_clip is {dual_clip}; a number above 1 is needed, or none")
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return ClippedLoss(loss, clipped > plain)


def _require_clips(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise AlgorithmError(f"clip_low {clip_low} must be in [0, 1] and clip_high {clip_high} not negative")
