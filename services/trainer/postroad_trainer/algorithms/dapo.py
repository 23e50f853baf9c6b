"""Over-length shaping of rewards. DAPO's dynamic sampling is the ledger's filter zero_std, its clip-higher and token loss are
settings of the loss and the reducer."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import AlgorithmError


def overlong_penalty(length_S: torch.Tensor, longest: int, buffer: int, factor: float = 1.0) -> torch.Tensor:
    """float32 [S] to be added to the reward: 0 up to longest - buffer tokens, then falling linearly to -factor at longest.

    Soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13).
    """
    if not 0 < buffer <= longest or factor < 0:
        raise AlgorithmError(
            f"buffer {buffer} must be in [1, {longest}], the longest response, and factor {factor} not negative"
        )
    return -factor * ((length_S.double() - (longest - buffer)) / buffer).clamp(0, 1).float()
