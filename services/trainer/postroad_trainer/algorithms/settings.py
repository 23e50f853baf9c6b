"""The numbers of an algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from postroad_trainer.algorithms.divergences import DivergenceKind
from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.rejection import ImportanceSettings


@dataclass(frozen=True)
class AlgorithmSettings:
    """clip_low, clip_high, dual_clip: of the ratio (dual_clip None: none; clip_low 1: no lower bound).
    discount, gae_lambda: of token rewards. whiten: advantages over the whole step.
    kl_kind; kl_reward_coefficient: of KL(old, reference) in the reward; kl_loss_coefficient: of KL(current, reference) in
    the loss, of which unbiased_kl multiplies exp(current - anchor); at most one of the two coefficients is not 0.
    entropy_coefficient: of the bonus. weight_low, weight_high: bounds of TIS, IcePop and decoupled weights.
    importance: of the MIS correction. off_policy_delta: OPSM's threshold, None: no such mask.
    distillation_coefficient, reward_weight: advantage = reward_weight A - distillation_coefficient (student - teacher).
    constant_length: divisor of the constant reducer, in tokens.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    discount: float = 1.0
    gae_lambda: float = 1.0
    whiten: bool = False
    kl_kind: DivergenceKind = "low_variance"
    kl_reward_coefficient: float = 0.0
    kl_loss_coefficient: float = 0.0
    unbiased_kl: bool = False
    entropy_coefficient: float = 0.0
    weight_low: float = 0.0
    weight_high: float = 2.0
    importance: ImportanceSettings = field(default_factory=ImportanceSettings)
    off_policy_delta: float | None = None
    distillation_coefficient: float = 0.0
    reward_weight: float = 1.0
    constant_length: int | None = None

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        wrong = {name: value for name, value in numbers.items() if not (math.isfinite(value) and value >= 0)}
        if wrong:
            raise AlgorithmError(f"{wrong}: every number of an algorithm must be finite and not negative")
        if self.kl_reward_coefficient and self.kl_loss_coefficient:
            raise AlgorithmError(
                f"kl_reward_coefficient {self.kl_reward_coefficient} and kl_loss_coefficient {self.kl_loss_coefficient} "
                "would count the divergence twice; set one of them to 0"
            )
