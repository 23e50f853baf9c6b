"""Which log-probabilities enter where.

role        whose weights scored the sampled tokens          enters
current     the live weights, with a gradient                every loss
engine      the inference engine's, while it sampled         corrections (TIS, MIS, IcePop, decoupled PPO); anchor of "bypass"
old         the trainer's, before the first step on the batch  anchor of the ratio; KL in the reward; distillation
proximal    the trainer's, at the start of this step (or an average of weights)  anchor of decoupled PPO
reference   the frozen reference model                        KL in the loss or in the reward; DPO
teacher     the model to learn from                           on-policy distillation

The anchor is the denominator of the policy ratio exp(current - anchor). Anchor "current" is current without its
gradient: the ratio is exactly 1, which is right when a batch gets one step. With keep-old-weights, `old` is scored by the
weights that the engine sampled with and differs from it only in numerics; otherwise it also contains staleness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, MissingScoreError, NotFiniteError

Role = Literal["current", "engine", "old", "proximal", "reference", "teacher"]
STORED: tuple[Role, ...] = ("engine", "old", "proximal", "reference", "teacher")
PRODUCERS: Mapping[str, str] = {
    "engine": "the rollout must record them while sampling",
    "old": "run the old-log-probability pass before the first step, or choose the anchor 'engine' or 'current'",
    "proximal": "run the log-probability pass at the start of the step, or choose the anchor 'old'",
    "reference": "run the reference pass, or set the KL coefficients to 0",
    "teacher": "score the samples with the teacher, or set the distillation coefficient to 0",
}


@dataclass(frozen=True, eq=False)
class LogProbabilities:
    """Log-probabilities of N sampled tokens under several weights.

    current_N: floating [N], differentiable while training. stored: role -> [N], all without a gradient.
    Finiteness is checked by `checked`, once when the scores arrive: it reads the device.
    """

    current_N: torch.Tensor
    stored: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role, scores_N in self.stored.items():
            if role not in STORED:
                raise AlgorithmError(
                    f"{role!r} is no role of stored log-probabilities; one of {', '.join(STORED)} expected"
                )
            if scores_N.shape != self.current_N.shape:
                raise AlgorithmError(
                    f"{role} log-probabilities have shape {tuple(scores_N.shape)}, current ones "
                    f"{tuple(self.current_N.shape)}; they must score the same tokens"
                )
            if scores_N.requires_grad:
                raise AlgorithmError(f"{role} log-probabilities carry a gradient; detach them before they are stored")
        object.__setattr__(self, "stored", MappingProxyType(dict(self.stored)))

    def of(self, role: Role) -> torch.Tensor:
        """[N] scores of a role without a gradient; raises MissingScoreError with what would produce them."""
        if role == "current":
            return self.current_N.detach()
        if role not in self.stored:
            raise MissingScoreError(f"the {role} log-probabilities are needed, but weren't computed: {PRODUCERS[role]}")
        return self.stored[role]

    def masked(self, mask_N: torch.Tensor) -> LogProbabilities:
        """The same with 0 where mask_N is False, so that nothing there reaches a result or a gradient."""
        return LogProbabilities(
            torch.where(mask_N, self.current_N, 0.0),
            {role: torch.where(mask_N, scores_N, 0.0) for role, scores_N in self.stored.items()},
        )

    def checked(self, mask_N: torch.Tensor) -> LogProbabilities:
        """Itself; raises NotFiniteError when a stored score of a trained token is NaN or infinite.

        current is left out: what is not finite there makes the gradient so, and the step is skipped and counted.
        """
        for role, scores_N in self.stored.items():
            wrong = int((~torch.isfinite(scores_N) & mask_N).sum())
            if wrong:
                raise NotFiniteError(
                    f"{wrong} of {int(mask_N.sum())} {role} log-probabilities are not finite; {PRODUCERS[role]} again, "
                    "or mask these tokens"
                )
        return self
