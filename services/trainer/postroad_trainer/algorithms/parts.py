"""The parts that an algorithm chooses from, by name, each brought to the signature of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from postroad_trainer.algorithms.corrections import decoupled_weights, icepop_weights, truncated_importance_weights
from postroad_trainer.algorithms.critic import generalised_advantages, token_rewards
from postroad_trainer.algorithms.groups import group_advantages, leave_one_out_advantages
from postroad_trainer.algorithms.log_probabilities import LogProbabilities, Role
from postroad_trainer.algorithms.losses import (
    ClippedLoss,
    clipped_policy_loss,
    clipped_weight_loss,
    sequence_policy_loss,
)
from postroad_trainer.algorithms.rejection import Correction, importance_correction
from postroad_trainer.algorithms.returns import reinforce_baseline_advantages, reinforce_plus_plus_returns
from postroad_trainer.algorithms.rewarded import Rewarded
from postroad_trainer.algorithms.segments import Segments
from postroad_trainer.algorithms.settings import AlgorithmSettings

AdvantageFunction = Callable[[Rewarded, Role, AlgorithmSettings], torch.Tensor]
LossFunction = Callable[[LogProbabilities, torch.Tensor, torch.Tensor, Segments, AlgorithmSettings], ClippedLoss]
CorrectionFunction = Callable[[torch.Tensor, LogProbabilities, Segments, AlgorithmSettings], Correction]


def _group(rewarded: Rewarded, _: Role, settings: AlgorithmSettings) -> torch.Tensor:
    return rewarded.segments.spread(group_advantages(rewarded.rewards()))


def _group_mean(rewarded: Rewarded, _: Role, settings: AlgorithmSettings) -> torch.Tensor:
    return rewarded.segments.spread(group_advantages(rewarded.rewards(), normalise_std=False))


def _leave_one_out(rewarded: Rewarded, _: Role, settings: AlgorithmSettings) -> torch.Tensor:
    return rewarded.segments.spread(leave_one_out_advantages(rewarded.rewards()))


def _reinforce_plus_plus(rewarded: Rewarded, anchor: Role, settings: AlgorithmSettings) -> torch.Tensor:
    coefficient = settings.kl_reward_coefficient
    kl_N = rewarded.divergence(anchor, settings)
    return reinforce_plus_plus_returns(rewarded.reward_S, kl_N, rewarded.segments, coefficient, settings.discount)


def _baseline(rewarded: Rewarded, anchor: Role, settings: AlgorithmSettings) -> torch.Tensor:
    centred_S = group_advantages(rewarded.rewards(), normalise_std=False)
    kl_N = rewarded.divergence(anchor, settings)
    return reinforce_baseline_advantages(centred_S, kl_N, rewarded.segments, settings.kl_reward_coefficient)


def _gae(rewarded: Rewarded, anchor: Role, settings: AlgorithmSettings) -> torch.Tensor:
    kl_N = rewarded.divergence(anchor, settings)
    reward_N = token_rewards(rewarded.reward_S, kl_N, rewarded.segments, settings.kl_reward_coefficient)
    values_N = rewarded.values()
    return generalised_advantages(
        reward_N, values_N, rewarded.segments, settings.discount, settings.gae_lambda
    ).advantage_N


def _clip(
    scores: LogProbabilities, anchor_N: torch.Tensor, advantage_N: torch.Tensor, _: Segments, by: AlgorithmSettings
) -> ClippedLoss:
    current_N = scores.of("current")
    return clipped_policy_loss(current_N, anchor_N, advantage_N, by.clip_low, by.clip_high, by.dual_clip)


def _sequence_clip(
    scores: LogProbabilities,
    anchor_N: torch.Tensor,
    advantage_N: torch.Tensor,
    segments: Segments,
    by: AlgorithmSettings,
) -> ClippedLoss:
    current_N = scores.of("current")
    return sequence_policy_loss(current_N, anchor_N, advantage_N, segments, by.clip_low, by.clip_high)


def _clipped_weight(
    scores: LogProbabilities, anchor_N: torch.Tensor, advantage_N: torch.Tensor, _: Segments, by: AlgorithmSettings
) -> ClippedLoss:
    return clipped_weight_loss(scores.of("current"), anchor_N, advantage_N, by.clip_low, by.clip_high)


def _weights_only(weight_N: torch.Tensor) -> Correction:
    return Correction(weight_N, torch.ones_like(weight_N, dtype=torch.bool), {"weight": weight_N})


def _none(anchor_N: torch.Tensor, scores: LogProbabilities, segments: Segments, by: AlgorithmSettings) -> Correction:
    return _weights_only(torch.ones_like(anchor_N))


def _tis(anchor_N: torch.Tensor, scores: LogProbabilities, segments: Segments, by: AlgorithmSettings) -> Correction:
    return _weights_only(truncated_importance_weights(anchor_N, scores.of("engine"), by.weight_high, by.weight_low))


def _icepop(anchor_N: torch.Tensor, scores: LogProbabilities, segments: Segments, by: AlgorithmSettings) -> Correction:
    return _weights_only(icepop_weights(anchor_N, scores.of("engine"), by.weight_low, by.weight_high))


def _decoupled(
    anchor_N: torch.Tensor, scores: LogProbabilities, segments: Segments, by: AlgorithmSettings
) -> Correction:
    return _weights_only(decoupled_weights(anchor_N, scores.of("engine"), by.weight_high))


def _importance(
    anchor_N: torch.Tensor, scores: LogProbabilities, segments: Segments, by: AlgorithmSettings
) -> Correction:
    return importance_correction(anchor_N, scores.of("engine"), segments, by.importance)


ADVANTAGES: Mapping[str, AdvantageFunction] = MappingProxyType(
    {
        "group": _group,
        "group_mean": _group_mean,
        "leave_one_out": _leave_one_out,
        "reinforce_plus_plus": _reinforce_plus_plus,
        "reinforce_plus_plus_baseline": _baseline,
        "gae": _gae,
    }
)
LOSSES: Mapping[str, LossFunction] = MappingProxyType(
    {"clip": _clip, "sequence_clip": _sequence_clip, "clipped_weight": _clipped_weight}
)
CORRECTIONS: Mapping[str, CorrectionFunction] = MappingProxyType(
    {"none": _none, "tis": _tis, "icepop": _icepop, "importance": _importance, "decoupled": _decoupled}
)
