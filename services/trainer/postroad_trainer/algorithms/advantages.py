"""Advantages of rewards that come as a table of groups of one size; see groups.py for the general form."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.groups import ExecutionRewards, group_advantages


def grpo_advantages(rewards_GN: torch.Tensor, normalise_std: bool = True) -> torch.Tensor:
    """Group-relative advantages [G, N] of N attempts at each of G prompts, each attempt one execution.

    The formula is group_advantages'. Computed in float64, returned as float32.
    Raises ValueError for rewards that are not finite or not two-dimensional.
    """
    if rewards_GN.ndim != 2:
        raise AlgorithmError(f"rewards have shape {tuple(rewards_GN.shape)}; [groups, attempts] expected")
    groups, attempts = rewards_GN.shape
    group_S = torch.arange(groups, device=rewards_GN.device).repeat_interleave(attempts)
    return group_advantages(ExecutionRewards.of(rewards_GN.flatten(), group_S), normalise_std).view(groups, attempts)
