"""A step put together from the parts of an algorithm."""

from __future__ import annotations

from typing import NamedTuple

import torch

from postroad.config.algorithm import AlgorithmSection
from postroad_trainer.algorithms.corrections import off_policy_sequence_mask
from postroad_trainer.algorithms.distillation import distilled_advantages
from postroad_trainer.algorithms.divergences import kl_estimate
from postroad_trainer.algorithms.errors import MissingScoreError
from postroad_trainer.algorithms.log_probabilities import LogProbabilities
from postroad_trainer.algorithms.parts import ADVANTAGES, CORRECTIONS, LOSSES, REDUCERS, Rewarded, part_of
from postroad_trainer.algorithms.ratios import bounded_ratio
from postroad_trainer.algorithms.reducers import reduced
from postroad_trainer.algorithms.segments import Reduce, Segments, alone
from postroad_trainer.algorithms.whitening import whiten


class PolicyObjective(NamedTuple):
    """loss: differentiable scalar, the sum of all micro-batches and ranks is the step's loss.

    sums: name -> scalar sum over this part's trained tokens, detached; divide by the step's `trained`.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def advantages_of_step(settings: AlgorithmSection, rewarded: Rewarded, reduce: Reduce = alone) -> torch.Tensor:
    """float32 [N], 0 at masked tokens: estimator, then distillation, then whitening over the ranks of reduce.

    Errors before the whitening are raised where the data is: give every rank the whole step (reduce is then `alone`), or
    let the reduction's deadline end the other ranks.
    """
    segments, scores = rewarded.segments, rewarded.scores
    advantage_N = part_of(ADVANTAGES, "advantage", settings.advantage)(rewarded, settings)
    coefficient = settings.distillation_coefficient
    if coefficient or settings.reward_weight != 1:
        reverse_kl_N = scores.anchor(settings.anchor) - scores.of("teacher") if coefficient else 0 * advantage_N
        advantage_N = distilled_advantages(advantage_N, reverse_kl_N, segments, coefficient, settings.reward_weight)
    if settings.whiten:
        advantage_N = whiten(advantage_N, segments.mask_N, reduce)
    return segments.masked(advantage_N).float()


def weights_of_step(settings: AlgorithmSection, trained_S: torch.Tensor, execution_S: torch.Tensor) -> torch.Tensor:
    """float64 [S]: the reducer's weights; trained_S and execution_S describe the whole step."""
    return part_of(REDUCERS, "reducer", settings.reducer)(trained_S, execution_S, settings)


def policy_objective(
    settings: AlgorithmSection,
    scores: LogProbabilities,
    advantage_N: torch.Tensor,
    segments: Segments,
    weight_S: torch.Tensor,
    entropy_N: torch.Tensor | None = None,
) -> PolicyObjective:
    """The policy loss of a micro-batch: N tokens of S samples, of which weight_S are the step's reducer weights.

    loss = sum of w (kept x correction x policy loss - entropy_coefficient H + kl_loss_coefficient KL(current, reference)).
    Masked tokens reach neither loss nor gradient nor sums, whatever they hold. A sample must be whole within `segments` and
    the ranks of segments.reduce. entropy_N is needed where its coefficient isn't 0, and may be detached otherwise.
    """
    scores, advantage_N = scores.masked(segments.mask_N), segments.masked(advantage_N)
    current_N, anchor_N = scores.of("current"), scores.anchor(settings.anchor)
    policy = part_of(LOSSES, "loss", settings.loss)(scores, advantage_N, segments, settings)
    correction = part_of(CORRECTIONS, "correction", settings.correction)(scores, segments, settings)
    kept_N = correction.kept_N
    if settings.off_policy_delta is not None:
        delta = settings.off_policy_delta
        kept_N = kept_N & off_policy_sequence_mask(current_N, anchor_N, advantage_N, segments, delta)
    loss_N = torch.where(kept_N, correction.weight_N * policy.loss_N, 0.0)
    terms = {"policy_loss": loss_N, "clipped": policy.clipped_N.float(), "rejected": (~kept_N).float()}
    terms |= {"ratio": bounded_ratio(current_N - anchor_N), "correction_weight": correction.weight_N}
    if entropy_N is not None:
        terms["entropy"] = entropy_N
        if settings.entropy_coefficient:
            loss_N = loss_N - settings.entropy_coefficient * segments.masked(entropy_N)
    elif settings.entropy_coefficient:
        raise MissingScoreError(f"entropy_coefficient is {settings.entropy_coefficient}, but no entropy was computed")
    if settings.kl_loss_coefficient:
        log_ratio_N = current_N - anchor_N if settings.unbiased_kl else None
        terms["kl_reference"] = kl_estimate(current_N, scores.of("reference"), settings.kl_kind, log_ratio_N)
        loss_N = loss_N + settings.kl_loss_coefficient * terms["kl_reference"]
    sums = {name: segments.masked(value_N.detach()).sum().double() for name, value_N in terms.items()}
    return PolicyObjective(reduced(loss_N, weight_S, segments), sums | {"trained": segments.mask_N.sum().double()})
