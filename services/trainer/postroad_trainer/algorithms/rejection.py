"""Importance weights and rejection at the level of tokens, sequences or their geometric mean (MIS, RS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from postroad_trainer.algorithms.corrections import require_bounds
from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.ratios import Level, ratio_at
from postroad_trainer.algorithms.segments import Segments

Mode = Literal["truncate", "clip", "mask", "none"]


@dataclass(frozen=True)
class Rejection:
    """Samples or tokens whose weight at `level` is outside [low, high] are not trained on."""

    level: Level
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise AlgorithmError(f"level is {self.level!r}; one of {', '.join(get_args(Level))} expected")
        require_bounds(self.low, self.high)


@dataclass(frozen=True)
class ImportanceSettings:
    """mode truncate: weights cut to [0, high]; clip: to [low, high]; mask: kept as they are and rejected outside;
    none: all weights 1, only rejection counts. low None is 1 / high. rejection: a further test, at its own level (the
    geometric one wants bounds as tight as 0.999 and 1.001). veto: a sample with one token whose weight is below it is
    rejected whole (1e-4 is usual; None: no veto).
    """

    level: Level = "token"
    mode: Mode = "truncate"
    high: float = 2.0
    low: float | None = None
    rejection: Rejection | None = None
    veto: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode) or self.level not in get_args(Level):
            raise AlgorithmError(
                f"mode {self.mode!r} must be one of {', '.join(get_args(Mode))}, "
                f"level {self.level!r} one of {', '.join(get_args(Level))}"
            )
        require_bounds(self.lower, self.high)
        if self.veto is not None and not 0 < self.veto < 1:
            raise AlgorithmError(f"the veto is {self.veto}; a weight between 0 and 1 is needed, or none")

    @property
    def lower(self) -> float:
        return 1 / self.high if self.low is None else self.low


class Correction(NamedTuple):
    """weight_N: detached multiplier of the loss; kept_N: bool, False where a token is rejected.

    Rejected tokens leave the numerator of the loss only; the reducer's denominators stay as they were.
    metrics: name -> float [N], to be averaged over the tokens trained before rejection.
    """

    weight_N: torch.Tensor
    kept_N: torch.Tensor
    metrics: dict[str, torch.Tensor]


def importance_correction(
    old_N: torch.Tensor, engine_N: torch.Tensor, segments: Segments, settings: ImportanceSettings
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
    flags = {"outside_fraction": outside_N, "rejected_fraction": ~kept_N, "vetoed_fraction": vetoed_N}
    metrics = {"weight_before_bound": before_N, "weight": weight_N} | {
        name: flag.float() for name, flag in flags.items()
    }
    return Correction(weight_N, kept_N, metrics)


def normalised_weights(weight_N: torch.Tensor, segments: Segments, level: Level) -> torch.Tensor:
    """Weights [N] divided by their mean: over all trained tokens, or at sequence level over samples.

    The mean is over what is handed in: give it the whole step before micro-batches are cut, otherwise the gradient
    depends on the cut. With segments.reduce over context parallel ranks it spans those; samples of other data-parallel
    ranks must be included by a reduce over DP x CP and a common numbering of samples. Raises AlgorithmError at the
    geometric level, where it is not defined. Mean 0 (all rejected to 0) leaves the weights as they are.
    """
    if level == "geometric":
        raise AlgorithmError("importance weights can't be normalised at the geometric level; use token or sequence")
    count_S = segments.counts(weight_N.dtype)
    if level == "sequence":
        mean = segments.means(weight_N).sum() / (count_S > 0).sum().clamp(min=1)
    else:
        mean = segments.sums(weight_N).sum() / count_S.sum().clamp(min=1)
    return weight_N / torch.where(mean > 0, mean, 1.0)
