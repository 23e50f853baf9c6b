"""Importance weights and rejection at the level of tokens, sequences or their geometric mean (MIS, RS)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from postroad.config.algorithm import ImportanceSection
from postroad_trainer.algorithms.ratios import ratio_at
from postroad_trainer.algorithms.segments import Segments


class Correction(NamedTuple):
    """weight_N: detached multiplier of the loss; kept_N: bool, False where a token is rejected.

    Rejected tokens leave the numerator of the loss only; the reducer's denominators stay as they were.
    """

    weight_N: torch.Tensor
    kept_N: torch.Tensor


def importance_correction(
    old_N: torch.Tensor, engine_N: torch.Tensor, segments: Segments, settings: ImportanceSection
) -> Correction:
    """Masked importance sampling, rejection sampling and veto on exp(old - engine).

    Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch"
    (token and sequence TIS / MIS; geometric rejection and veto in its part 3); sequence: exp(sum x), geometric:
    exp(mean x) over the sample's trained tokens. Weight 1 and kept at masked tokens.
    """
    log_ratio_N = (old_N - engine_N).detach()
    before_N = ratio_at(log_ratio_N, segments, settings.level)
    outside_N = (before_N < settings.lower) | (before_N > settings.high)
    weight_N, kept_N = before_N, torch.ones_like(segments.mask_N)
    if settings.mode == "none":
        weight_N = torch.ones_like(before_N)
    elif settings.mode == "mask":
        kept_N = ~outside_N
    else:
        weight_N = before_N.clamp(0.0 if settings.mode == "truncate" else settings.lower, settings.high)
    if settings.rejection is not None:
        tested_N = ratio_at(log_ratio_N, segments, settings.rejection.level)
        kept_N = kept_N & (tested_N >= settings.rejection.low) & (tested_N <= settings.rejection.high)
    vetoed_N = torch.zeros_like(kept_N)
    if settings.veto is not None:
        catastrophic_N = (log_ratio_N < math.log(settings.veto)).to(log_ratio_N.dtype)
        vetoed_N = segments.spread(segments.sums(catastrophic_N) > 0)
    kept_N = (kept_N & ~vetoed_N) | ~segments.mask_N
    return Correction(weight_N, kept_N)
