"""Which log-probabilities enter where.

role       whose weights scored the sampled tokens            enters
current    the live weights, the only one with a gradient     every loss
engine     the inference engine's, while it sampled           corrections (TIS, MIS, IcePop, decoupled); anchor of bypass
old        the trainer's, before the first step on the batch  anchor; KL in the reward; student of distillation
proximal   the trainer's, before the first update on the batch  anchor of decoupled PPO
reference  the frozen reference model                         KL in the loss or in the reward; DPO
teacher    the model to learn from                            on-policy distillation
value      the critic's estimate of what is still to come     PPO; the one that is no log-probability

The anchor is the denominator of the policy ratio exp(current - anchor). Anchor "current" is current without its
gradient: the ratio is exactly 1, which is right when a batch gets one step. Where `old` is scored by the weights that the
engine sampled with it differs from `engine` only in numerics; otherwise the difference also contains staleness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, MissingScoreError

Role = Literal["current", "engine", "old", "proximal", "reference", "teacher", "value"]
REMEDIES: Mapping[Role, str] = {
    "current": "run the training forward and add them by with_current",
    "engine": "record them while sampling",
    "old": "run the old-log-probability pass before the first step, or choose the anchor 'engine' or 'current'",
    "proximal": "run the log-probability pass at the start of the step, or choose the anchor 'old'",
    "reference": "run the reference pass, or set the KL coefficients to 0",
    "teacher": "score the samples with the teacher, or set the distillation coefficient to 0",
    "value": "run the critic's forward pass first",
}


@dataclass(frozen=True, eq=False)
class LogProbabilities:
    """Log-probabilities of the same N sampled tokens by role, [N] each. Only current may carry a gradient."""

    scores: Mapping[Role, torch.Tensor]

    def __post_init__(self) -> None:
        shapes = {role: tuple(score_N.shape) for role, score_N in self.scores.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise AlgorithmError(f"log-probabilities have shapes {shapes}; all must score the same [N] tokens")
        for role, score_N in self.scores.items():
            if role not in REMEDIES:
                raise AlgorithmError(f"{role!r} scores no tokens; one of {', '.join(REMEDIES)} expected")
            if role != "current" and score_N.requires_grad:
                raise AlgorithmError(f"{role} log-probabilities carry a gradient; detach them before they are stored")
        object.__setattr__(self, "scores", MappingProxyType(dict(self.scores)))

    def of(self, role: Role) -> torch.Tensor:
        """[N], current with its gradient. Raises MissingScoreError with what would produce them."""
        if role not in self.scores:
            raise MissingScoreError(f"{role} log-probabilities are needed but were not computed: {REMEDIES[role]}")
        return self.scores[role]

    def anchor(self, role: Role) -> torch.Tensor:
        """[N] without a gradient."""
        return self.of(role).detach()

    def with_current(self, current_N: torch.Tensor) -> LogProbabilities:
        return LogProbabilities({**self.scores, "current": current_N})

    def masked(self, mask_N: torch.Tensor) -> LogProbabilities:
        """The same with 0 where mask_N is False, so that nothing there reaches a result or a gradient."""
        return LogProbabilities({role: torch.where(mask_N, score_N, 0.0) for role, score_N in self.scores.items()})
