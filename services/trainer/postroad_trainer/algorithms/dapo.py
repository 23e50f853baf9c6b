"""DAPO's parts that are neither loss nor reducer: dynamic sampling and over-length shaping.

Its clip-higher is clipped_policy_loss with clip_high > clip_low, its token loss the token reducer, its overlong filtering
masks.keep_samples.
"""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.groups import ExecutionRewards

SMALLEST_DEVIATION = 1e-8


def informative_groups(rewards: ExecutionRewards) -> torch.Tensor:
    """bool [G], groups in ascending order of their names: False where every advantage would be 0; sample another instead.

    Dynamic sampling, 0 < correct < n (Yu et al. 2025, arXiv:2503.14476, eq. 11), for any rewards: their unbiased standard
    deviation is above 1e-8. A group of one execution is never informative.
    """
    return rewards.spread() & (rewards.deviations() > SMALLEST_DEVIATION)


def overlong_penalty(length_S: torch.Tensor, longest: int, buffer: int, factor: float = 1.0) -> torch.Tensor:
    """float32 [S] to be added to the reward: 0 up to longest - buffer tokens, then falling linearly to -factor at longest.

    Soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13).
    """
    if not 0 < buffer <= longest or factor < 0:
        raise AlgorithmError(
            f"buffer {buffer} must be in [1, {longest}], the longest response, and factor {factor} not negative"
        )
    return -factor * ((length_S.double() - (longest - buffer)) / buffer).clamp(0, 1).float()
