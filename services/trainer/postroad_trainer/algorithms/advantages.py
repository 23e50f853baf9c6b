"""Advantages from the rewards of a group."""

from __future__ import annotations

import torch

EPSILON = 1e-6


def grpo_advantages(rewards_GN: torch.Tensor, normalise_std: bool = True) -> torch.Tensor:
    """Group-relative advantages [G, N] of N attempts at each of G prompts.

    A = (r - mean) / (std + 1e-6) with the unbiased (n - 1) standard deviation (Shao et al. 2024, DeepSeekMath,
    arXiv:2402.03300, eq. 3); without normalise_std A = r - mean (Liu et al. 2025, Dr.GRPO, arXiv:2503.20783).
    A group of one attempt, or of equal rewards, has advantage 0. Computed in float64, returned as float32.
    Raises ValueError for rewards that are not finite or not two-dimensional.
    """
    if rewards_GN.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards_GN.shape)}; [groups, attempts] expected")
    if not torch.isfinite(rewards_GN).all():
        raise ValueError("a reward is not finite; a failed grader is an error to retry, never a reward")
    rewards = rewards_GN.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    # Equal rewards must give exactly 0, which the rounding of their mean would spoil.
    spread = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    centred = torch.where(spread, centred, torch.zeros_like(centred))
    if normalise_std and rewards.shape[1] > 1:
        centred = centred / torch.where(spread, rewards.std(1, keepdim=True) + EPSILON, torch.ones_like(centred[:, :1]))
    return centred.float()
