"""Which samples are trained at all. A masked sample keeps its place, and its reward in the mean of its group."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, NothingTrainedError
from postroad_trainer.algorithms.segments import Segments


def keep_samples(segments: Segments, kept_S: torch.Tensor) -> Segments:
    """Segments in which samples with kept_S False (bool [S]) train no token.

    With kept = not truncated this is DAPO's overlong filtering (Yu et al. 2025, arXiv:2503.14476, §3.4).
    """
    if kept_S.dtype != torch.bool or kept_S.shape != (segments.samples,):
        raise AlgorithmError(
            f"kept_S is {kept_S.dtype} {tuple(kept_S.shape)}; bool [{segments.samples}] expected, one per sample"
        )
    return segments.with_mask(segments.mask_N & segments.spread(kept_S))


def untrained_samples(segments: Segments) -> list[int]:
    """Samples without a trained token, to be counted: they cost compute and teach nothing."""
    return (segments.counts() == 0).nonzero().flatten().tolist()


def require_trained(segments: Segments) -> None:
    """Raises NothingTrainedError unless some token is trained."""
    if not bool((segments.counts() > 0).any()):
        raise NothingTrainedError(f"none of the {segments.samples} samples has a trained token; skip the step")
