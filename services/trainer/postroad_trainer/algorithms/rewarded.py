"""What advantages are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from postroad_trainer.algorithms.divergences import kl_estimate
from postroad_trainer.algorithms.errors import MissingScoreError
from postroad_trainer.algorithms.groups import ExecutionRewards
from postroad_trainer.algorithms.log_probabilities import LogProbabilities, Role
from postroad_trainer.algorithms.segments import Segments
from postroad_trainer.algorithms.settings import AlgorithmSettings


@dataclass(frozen=True, eq=False)
class Rewarded:
    """The graded samples of a step, whole samples and whole groups.

    reward_S: floating; group_S, execution_S: int64 names. segments: their packed tokens.
    scores: stored log-probabilities, those that the algorithm needs. value_N: the critic's, before its update.
    """

    reward_S: torch.Tensor
    group_S: torch.Tensor
    execution_S: torch.Tensor
    segments: Segments
    scores: LogProbabilities
    value_N: torch.Tensor | None = None

    def rewards(self) -> ExecutionRewards:
        return ExecutionRewards.of(self.reward_S, self.group_S, self.execution_S)

    def divergence(self, anchor: Role, settings: AlgorithmSettings) -> torch.Tensor:
        """[N] KL(anchor || reference) for the reward; 0 where its coefficient is 0. At masked tokens too."""
        if not settings.kl_reward_coefficient:
            return torch.zeros(len(self.segments.mask_N), device=self.segments.mask_N.device)
        return kl_estimate(self.scores.anchor(anchor), self.scores.of("reference"), settings.kl_kind)

    def values(self) -> torch.Tensor:
        if self.value_N is None:
            raise MissingScoreError("the critic's values are needed but were not computed: run its forward pass first")
        return self.value_N
