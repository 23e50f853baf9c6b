"""PPO with a critic: generalised advantages and the value loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, NotFiniteError
from postroad_trainer.algorithms.returns import packed_discounted_sums
from postroad_trainer.algorithms.segments import Segments


class GeneralisedAdvantages(NamedTuple):
    """advantage_N, return_N (what the critic learns): float32 [N], 0 at masked tokens."""

    advantage_N: torch.Tensor
    return_N: torch.Tensor


class ValueLoss(NamedTuple):
    """loss_N: differentiable, 0 at masked tokens; clipped_N: bool, where the clipped branch was taken."""

    loss_N: torch.Tensor
    clipped_N: torch.Tensor


def generalised_advantages(
    reward_N: torch.Tensor, value_N: torch.Tensor, segments: Segments, discount: float, gae_lambda: float
) -> GeneralisedAdvantages:
    """GAE over the trained tokens of each sample (Schulman et al. 2015, arXiv:1506.02438, eq. 11-16).

    delta_t = r_t + discount V_(t+1) - V_t;  A_t = delta_t + discount gae_lambda A_(t+1);  return = A + V.
    Masked tokens (observations, tool output) are no steps of the policy: they are taken out first, so there is no decay
    across them and their values have no influence. V after the last token is 0, also for a truncated sample.
    reward_N comes from token_rewards. A sample without a trained token gives zeros. Samples must be whole on this rank.
    Raises NotFiniteError for a reward or value of a trained token.
    """
    reward_N, value_N = segments.masked(reward_N).double(), segments.masked(value_N).double()
    if not (torch.isfinite(reward_N).all() and torch.isfinite(value_N).all()):
        raise NotFiniteError(
            "a reward or critic value of a trained token is not finite; check the grader and the critic"
        )
    delta_N = reward_N + discount * _next(value_N, segments) - value_N
    advantage_N = packed_discounted_sums(delta_N, segments, segments.mask_N, discount * gae_lambda)
    return GeneralisedAdvantages(advantage_N.float(), segments.masked(advantage_N + value_N).float())


def _next(value_N: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[N]: the value at the next trained token of the same sample; 0 after the last and at masked tokens."""
    chosen = segments.mask_N.nonzero().flatten()
    chosen = chosen[torch.argsort(segments.sample_N[chosen], stable=True)]
    here, after = chosen[:-1], chosen[1:]
    same = segments.sample_N[here] == segments.sample_N[after]
    return torch.zeros_like(value_N).index_copy(0, here[same], value_N[after[same]])


def token_rewards(
    reward_S: torch.Tensor, kl_N: torch.Tensor, segments: Segments, kl_coefficient: float
) -> torch.Tensor:
    """float64 [N]: -kl_coefficient kl_t, plus the sample's reward at its last trained token; 0 at masked tokens.

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2 (KL in the reward); the terminal reward as in Ouyang et al. 2022,
    arXiv:2203.02155. The reward of a sample without a trained token has no place and is dropped: count such samples.
    """
    terminal_N = torch.where(segments.last(), segments.spread(reward_S.double()), 0.0)
    return terminal_N - kl_coefficient * segments.masked(kl_N).double()


def value_loss(
    value_N: torch.Tensor, old_value_N: torch.Tensor, return_N: torch.Tensor, mask_N: torch.Tensor, clip: float
) -> ValueLoss:
    """max((V - R)^2, (V_old + clamp(V - V_old, +-clip) - R)^2) [N], no factor 1/2; reduce it as a policy loss.

    The clipped value loss of OpenAI Baselines' ppo2 (Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9).
    """
    if not clip > 0:
        raise AlgorithmError(f"the value clip is {clip}; a number above 0 is needed (a large one never clips)")
    value_N, old_value_N, return_N = (torch.where(mask_N, x_N, 0.0) for x_N in (value_N, old_value_N, return_N))
    plain = (value_N - return_N).square()
    clipped = (old_value_N + (value_N - old_value_N).clamp(-clip, clip) - return_N).square()
    return ValueLoss(torch.maximum(plain, clipped), clipped > plain)
