"""Learning from given responses: fine-tuning and preferences."""

from __future__ import annotations

from typing import NamedTuple

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, NothingTrainedError
from postroad_trainer.algorithms.log_probabilities import LogProbabilities
from postroad_trainer.algorithms.segments import Segments


def fine_tuning_loss(current_N: torch.Tensor, segments: Segments) -> torch.Tensor:
    """SFT: -log p of each trained token, [N], 0 elsewhere; usually reduced by token."""
    return -segments.masked(current_N)


class PreferenceLoss(NamedTuple):
    """loss_P: differentiable, its mean over all pairs of the step is the loss. The rewards are detached."""

    loss_P: torch.Tensor
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor


def preference_loss(
    scores: LogProbabilities, segments: Segments, pair_P2: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> PreferenceLoss:
    """DPO: -log sigmoid(h), h = beta ((current - reference of the chosen) - (current - reference of the rejected)).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; sums run over the trained tokens of a sample. label_smoothing e:
    -(1 - e) log sigmoid(h) - e log sigmoid(-h) (Mitchell 2023, "A note on DPO with noisy preferences", cDPO).
    pair_P2: int64, samples (chosen, rejected). With context parallelism segments.reduce must be differentiable and the
    loss counted once per group. Raises NothingTrainedError for a pair with a sample without trained tokens.
    """
    if not (beta > 0 and 0 <= label_smoothing < 0.5):
        raise AlgorithmError(f"beta {beta} must be above 0 and label_smoothing {label_smoothing} in [0, 0.5)")
    if pair_P2.ndim != 2 or pair_P2.shape[1] != 2:
        raise AlgorithmError(f"pairs have shape {tuple(pair_P2.shape)}; [pairs, 2] expected: chosen, rejected")
    if bool((segments.counts()[pair_P2] == 0).any()):
        raise NothingTrainedError("a preference pair holds a sample without a trained token; drop the pair")
    reward_S = beta * segments.sums(scores.of("current") - scores.of("reference"))
    chosen_P, rejected_P = reward_S[pair_P2].unbind(1)
    margin_P = chosen_P - rejected_P
    log_sigmoid = torch.nn.functional.logsigmoid
    loss_P = -(1 - label_smoothing) * log_sigmoid(margin_P) - label_smoothing * log_sigmoid(-margin_P)
    return PreferenceLoss(loss_P, chosen_P.detach(), rejected_P.detach())
