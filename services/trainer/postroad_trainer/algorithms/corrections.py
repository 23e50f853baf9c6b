"""Corrections for the gap between the policy that sampled and the policy that the ratio starts from: token weights.

x = anchor - engine, where the anchor is the denominator of the ratio (old, or proximal when decoupled). All detached.
"""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.ratios import bounded_ratio
from postroad_trainer.algorithms.segments import Segments


def truncated_importance_weights(
    old_N: torch.Tensor, engine_N: torch.Tensor, cap: float, floor: float = 0.0
) -> torch.Tensor:
    """Truncated importance sampling (TIS): w = clamp(exp(old - engine), floor, cap), per token, detached.

    old: the trainer's own log-probabilities with the weights before the step; engine: those recorded while
    sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; truncation
    after Ionides 2008). The log ratio is bounded to +-20 first so that a broken token can't overflow.
    """
    require_bounds(floor, cap)
    return bounded_ratio((old_N - engine_N).detach()).clamp(floor, cap)


def icepop_weights(old_N: torch.Tensor, engine_N: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """IcePop: w = exp(old - engine) within [low, high], 0 outside; per token, detached.

    Ling Team 2025, Ring-1T, arXiv:2510.18855 (and "Small leak can sink a great ship"). The token leaves the numerator
    only: masks and denominators of the reducer stay.
    """
    require_bounds(low, high)
    weight = bounded_ratio((old_N - engine_N).detach())
    return torch.where((weight < low) | (weight > high), 0.0, weight)


def decoupled_weights(proximal_N: torch.Tensor, behaviour_N: torch.Tensor, cap: float) -> torch.Tensor:
    """Decoupled PPO: w = exp(proximal - behaviour), 0 above the cap; per token, detached.

    The loss is w times the clipped loss whose ratio is exp(current - proximal) (Hilton et al. 2021, arXiv:2110.00641,
    eq. 2; Fu et al. 2025, AReaL, arXiv:2505.24298, §5.2). behaviour: the policy that sampled, by the engine's scores, or by
    `old` of the same weights where the engine's numerics shall not count. With proximal = old, behaviour = engine and
    no token above the cap it equals TIS.
    """
    require_bounds(0.0, cap)
    weight = bounded_ratio((proximal_N - behaviour_N).detach())
    return torch.where(weight > cap, 0.0, weight)


def off_policy_sequence_mask(
    current_N: torch.Tensor, old_N: torch.Tensor, advantage_N: torch.Tensor, segments: Segments, delta: float
) -> torch.Tensor:
    """OPSM: bool [N], False at tokens with A < 0 of samples whose mean of (old - current) is above delta.

    A bad sample that the policy has already moved away from teaches nothing and destabilises (DeepSeek-AI 2025,
    DeepSeek-V3.2, arXiv:2512.02556, §3.1 "Off-Policy Sequence Masking"). Detached. True at masked tokens.
    """
    drift_S = segments.means((old_N - current_N).detach())
    return ~((segments.masked(advantage_N) < 0) & segments.spread(drift_S > delta))


def require_bounds(low: float, high: float) -> None:
    if not (0 <= low <= high and high > 0):
        raise AlgorithmError(
            f"bounds of the importance weight are [{low}, {high}]; 0 <= low <= high, high above 0 expected"
        )
