"""The parts that an algorithm chooses from, by name or by the dotted path of a user's function of the same signature.

A step runs them in this order:
1. advantage   Rewarded (the whole step) -> [N]   advantages_of_step, which then mixes distillation in and whitens
2. reducer     token counts of the whole step -> [S] weights of a token of each sample
3. loss        scores, advantages -> [N] per token
4. correction  scores -> weight, kept [N]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from postroad.config.algorithm import AlgorithmSection
from postroad_trainer.algorithms.corrections import decoupled_weights, icepop_weights, truncated_importance_weights
from postroad_trainer.algorithms.critic import (
    GeneralisedAdvantages,
    generalised_advantages,
    token_rewards,
    value_loss,
)
from postroad_trainer.algorithms.divergences import kl_estimate
from postroad_trainer.algorithms.groups import (
    ExecutionRewards,
    group_advantages,
    leave_one_out_advantages,
    preference_advantages,
)
from postroad_trainer.algorithms.log_probabilities import LogProbabilities
from postroad_trainer.algorithms.losses import (
    ClippedLoss,
    clipped_policy_loss,
    clipped_weight_loss,
    sequence_policy_loss,
    weighted_loss,
)
from postroad_trainer.algorithms.reducers import reduction_weights
from postroad_trainer.algorithms.rejection import Correction, importance_correction
from postroad_trainer.algorithms.returns import reinforce_baseline_advantages, reinforce_plus_plus_returns
from postroad_trainer.algorithms.segments import Segments
from postroad_trainer.plug_points import plug_point


@dataclass(frozen=True, eq=False)
class Rewarded:
    """The graded samples of a step, whole samples and whole groups.

    reward_S: floating; group_S, execution_S: int64 names. segments: their packed tokens.
    scores: stored log-probabilities, those that the algorithm needs.
    """

    reward_S: torch.Tensor
    group_S: torch.Tensor
    execution_S: torch.Tensor
    segments: Segments
    scores: LogProbabilities

    def rewards(self) -> ExecutionRewards:
        return ExecutionRewards.of(self.reward_S, self.group_S, self.execution_S)

    def divergence(self, settings: AlgorithmSection) -> torch.Tensor:
        """[N] KL(anchor || reference) for the reward; 0 where its coefficient is 0. At masked tokens too."""
        if not settings.kl_reward_coefficient:
            return torch.zeros(len(self.segments.mask_N), device=self.segments.mask_N.device)
        return kl_estimate(self.scores.anchor(settings.anchor), self.scores.of("reference"), settings.kl_kind)


AdvantageFunction = Callable[[Rewarded, AlgorithmSection], torch.Tensor]
LossFunction = Callable[[LogProbabilities, torch.Tensor, Segments, AlgorithmSection], ClippedLoss]
CorrectionFunction = Callable[[LogProbabilities, Segments, AlgorithmSection], Correction]
ReducerFunction = Callable[[torch.Tensor, torch.Tensor, AlgorithmSection], torch.Tensor]


def _reinforce_plus_plus(step: Rewarded, by: AlgorithmSection) -> torch.Tensor:
    kl_N, coefficient = step.divergence(by), by.kl_reward_coefficient
    return reinforce_plus_plus_returns(step.reward_S, kl_N, step.segments, coefficient, by.discount)


def _baseline(step: Rewarded, by: AlgorithmSection) -> torch.Tensor:
    centred_S = group_advantages(step.rewards(), normalise_std=False)
    return reinforce_baseline_advantages(centred_S, step.divergence(by), step.segments, by.kl_reward_coefficient)


def _gae(step: Rewarded, by: AlgorithmSection) -> torch.Tensor:
    return generalised(step, by).advantage_N


def generalised(step: Rewarded, by: AlgorithmSection) -> GeneralisedAdvantages:
    """PPO's advantages, and the returns that its critic learns."""
    reward_N = token_rewards(step.reward_S, step.divergence(by), step.segments, by.kl_reward_coefficient)
    return generalised_advantages(reward_N, step.scores.of("value"), step.segments, by.discount, by.gae_lambda)


def _value(scores: LogProbabilities, return_N: torch.Tensor, segments: Segments, by: AlgorithmSection) -> ClippedLoss:
    """The critic's loss: current are its values, and the advantages hold the returns."""
    loss = value_loss(scores.of("current"), scores.of("value"), return_N, segments.mask_N, by.value_clip)
    return ClippedLoss(*loss)


def _preference(step: Rewarded, by: AlgorithmSection) -> torch.Tensor:
    log_ratio_N = step.scores.anchor(by.anchor) - step.scores.of("reference")
    margin_S = by.preference_beta * step.segments.sums(log_ratio_N)
    return step.segments.spread(by.preference_beta * preference_advantages(step.rewards(), margin_S))


def _weights_only(weight_N: torch.Tensor) -> Correction:
    return Correction(weight_N, torch.ones_like(weight_N, dtype=torch.bool))


def _pair(scores: LogProbabilities, by: AlgorithmSection) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.anchor(by.anchor), scores.of("engine")


ADVANTAGES: Mapping[str, AdvantageFunction] = {
    "group": lambda step, by: step.segments.spread(group_advantages(step.rewards())),
    "group_mean": lambda step, by: step.segments.spread(group_advantages(step.rewards(), normalise_std=False)),
    "leave_one_out": lambda step, by: step.segments.spread(leave_one_out_advantages(step.rewards())),
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _baseline,
    "gae": _gae,
    "preference": _preference,
    "one": lambda step, by: torch.ones(len(step.segments.mask_N)),
}
LOSSES: Mapping[str, LossFunction] = {
    "clip": lambda scores, advantage_N, segments, by: clipped_policy_loss(
        scores.of("current"), scores.anchor(by.anchor), advantage_N, by.clip_low, by.clip_high, by.dual_clip
    ),
    "sequence_clip": lambda scores, advantage_N, segments, by: sequence_policy_loss(
        scores.of("current"), scores.anchor(by.anchor), advantage_N, segments, by.clip_low, by.clip_high
    ),
    "clipped_weight": lambda scores, advantage_N, segments, by: clipped_weight_loss(
        scores.of("current"), scores.anchor(by.anchor), advantage_N, by.clip_low, by.clip_high
    ),
    "value": _value,
    "weighted": lambda scores, advantage_N, segments, by: weighted_loss(scores.of("current"), advantage_N),
}
CORRECTIONS: Mapping[str, CorrectionFunction] = {
    "none": lambda scores, segments, by: _weights_only(torch.ones_like(scores.anchor(by.anchor))),
    "tis": lambda scores, segments, by: _weights_only(
        truncated_importance_weights(*_pair(scores, by), by.weight_high, by.weight_low)
    ),
    "icepop": lambda scores, segments, by: _weights_only(
        icepop_weights(*_pair(scores, by), by.weight_low, by.weight_high)
    ),
    "decoupled": lambda scores, segments, by: _weights_only(decoupled_weights(*_pair(scores, by), by.weight_high)),
    "importance": lambda scores, segments, by: importance_correction(*_pair(scores, by), segments, by.importance),
}
REDUCERS: Mapping[str, ReducerFunction] = dict.fromkeys(("sample", "token", "constant"), reduction_weights)


def part_of(table: Mapping[str, Any], kind: str, name: str) -> Any:
    """The registered function, or the user's. Raises PlugPointError for a path that leads nowhere."""
    return table[name] if name in table else plug_point(f"trainer.algorithm.{kind}", name)


def require_parts(algorithm: AlgorithmSection) -> None:
    """Raises PlugPointError unless every part of the algorithm can be found: at the start, not at the first step."""
    for table, kind in (
        (ADVANTAGES, "advantage"),
        (LOSSES, "loss"),
        (CORRECTIONS, "correction"),
        (REDUCERS, "reducer"),
    ):
        part_of(table, kind, getattr(algorithm, kind))
