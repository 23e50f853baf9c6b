"""The algorithm of a step: a name gives every setting its value, and a recipe changes what it wants to.

The mathematics are the trainer's (postroad_trainer.algorithms, docs/algorithms.md); the numbers are checked here, so that
`postroad recipe check` finds what does not go together without torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from postroad.config.section import Section

Advantage = Literal[
    "group",
    "group_mean",
    "leave_one_out",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "gae",
    "preference",
    "one",
]
Loss = Literal["clip", "sequence_clip", "clipped_weight", "weighted", "value"]
Correction = Literal["none", "tis", "icepop", "importance", "decoupled"]
Reducer = Literal["sample", "token", "constant"]
Anchor = Literal["current", "old", "proximal", "engine"]
Level = Literal["token", "sequence", "geometric"]
DivergenceKind = Literal["k1", "k2", "k3", "low_variance"]
DOTTED_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
DottedPath = Annotated[str, Field(pattern=f"^{DOTTED_PATH}$")]

# Advantages that compare the members of a group.
OF_GROUPS = ("group", "group_mean", "leave_one_out", "reinforce_plus_plus_baseline", "preference")
_WITHOUT_TOKEN_REWARDS = ("group", "group_mean", "leave_one_out", "preference", "one")

# What a name stands for, where it differs from the fields' defaults.
ALGORITHMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {},
        "dr_grpo": {"advantage": "group_mean", "reducer": "constant"},
        "dapo": {"reducer": "token", "clip_high": 0.28},
        "gspo": {"loss": "sequence_clip", "clip_low": 3e-4, "clip_high": 4e-4},
        # The paper leaves its upper bound open: weights up to 5.
        "cispo": {"loss": "clipped_weight", "reducer": "token", "clip_low": 1.0, "clip_high": 4.0},
        "rloo": {"advantage": "leave_one_out"},
        "reinforce_plus_plus": {"advantage": "reinforce_plus_plus", "whiten": True},
        "reinforce_plus_plus_baseline": {"advantage": "reinforce_plus_plus_baseline", "whiten": True},
        "ppo": {"advantage": "gae"},
        "decoupled_ppo": {"correction": "decoupled", "anchor": "proximal"},
        "distillation": {"reducer": "token", "distillation_coefficient": 1.0, "reward_weight": 0.0},
        "sft": {"advantage": "one", "loss": "weighted", "reducer": "token", "correction": "none"},
        "dpo": {
            "advantage": "preference",
            "loss": "weighted",
            "reducer": "constant",
            "constant_length": 1,
            "correction": "none",
            "anchor": "old",
        },
    }
)


def named(kind: str, names: tuple[str, ...]) -> AfterValidator:
    """A registered name or a dotted path to a function of the user's."""

    def check(value: str) -> str:
        if value in names or re.fullmatch(DOTTED_PATH, value):
            return value
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(names)}"
        raise ValueError(f"there is no {kind} {value!r}: {hint} (or the dotted path of your own function)")

    return AfterValidator(check)


def _bounds(low: float, high: float) -> None:
    if not (0 <= low <= high and high > 0):
        raise ValueError(f"the bounds are [{low}, {high}]; 0 <= low <= high and high above 0 are needed")


class RejectionSection(Section):
    """Samples or tokens whose weight at `level` is outside [low, high] are not trained on."""

    level: Level = Field(description="token, sequence (product of the ratios) or geometric (their mean).")
    low: float = Field(description="Smallest weight kept; the geometric level wants bounds as tight as 0.999.")
    high: float = Field(description="Largest weight kept, such as 1.001 at the geometric level.")

    @model_validator(mode="after")
    def _ordered(self) -> RejectionSection:
        _bounds(self.low, self.high)
        return self


class ImportanceSection(Section):
    """The correction `importance`: masked importance sampling, rejection and veto."""

    level: Level = Field("token", description="Of what the weight is: a token, a whole sequence, or its mean ratio.")
    mode: Literal["truncate", "clip", "mask", "none"] = Field(
        "truncate", description="truncate to [0, high], clip to [low, high], mask what is outside, or no weight at all."
    )
    high: float = Field(2.0, description="Upper bound of the weight.")
    low: float | None = Field(None, description="Lower bound; null is 1 / high.")
    rejection: RejectionSection | None = Field(None, description="A further test, at its own level.")
    veto: float | None = Field(
        None, gt=0, lt=1, description="A sample with one token below this weight is rejected whole (1e-4 is usual)."
    )

    @property
    def lower(self) -> float:
        return 1 / self.high if self.low is None else self.low

    @model_validator(mode="after")
    def _ordered(self) -> ImportanceSection:
        _bounds(0.0 if self.high <= 0 else self.lower, self.high)
        return self


class AlgorithmSection(Section):
    """How a batch becomes a gradient. `trainer.algorithm: grpo` is short for its name alone; a name brings its own values
    (docs/algorithms.md), and those below are grpo's."""

    name: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
        "ppo", "decoupled_ppo", "distillation", "sft", "dpo",
    ] = Field("dapo", description="Gives every other key of this section its value.")  # fmt: skip
    updates: int = Field(1, ge=1, description="Optimizer updates that a batch is cut into, whole groups each.")
    advantage: Annotated[str, named("advantage", get_args(Advantage))] = Field(
        "group", description=f"{', '.join(get_args(Advantage))}, or a dotted path."
    )
    loss: Annotated[str, named("loss", get_args(Loss))] = Field(
        "clip", description=f"{', '.join(get_args(Loss))}, or a dotted path."
    )
    correction: Annotated[str, named("correction", get_args(Correction))] = Field(
        "tis", description=f"Of engine and trainer: {', '.join(get_args(Correction))}, or a dotted path."
    )
    reducer: Annotated[str, named("reducer", get_args(Reducer))] = Field(
        "sample", description=f"How token losses become one: {', '.join(get_args(Reducer))}, or a dotted path."
    )
    anchor: Anchor = Field(
        "current", description="Denominator of the ratio. current (ratio 1) unless something needs the scores of old."
    )
    clip_low: float = Field(0.2, ge=0, le=1, description="The ratio is clipped below 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="The ratio is clipped above 1 + clip_high.")
    dual_clip: float | None = Field(None, gt=1, description="Bound of the loss of bad tokens, in advantages.")
    discount: float = Field(1.0, ge=0, le=1, description="Of token rewards (reinforce_plus_plus, gae).")
    gae_lambda: float = Field(1.0, ge=0, le=1, description="gae: 1 trusts the rewards, 0 the critic.")
    value_clip: float = Field(0.2, gt=0, description="The critic's values move by so much in an update.")
    critic_learning_rate: float = Field(1e-5, gt=0, description="Of the critic.")
    critic_only_steps: int = Field(0, ge=0, description="First steps, in which the critic alone learns.")
    whiten: bool = Field(False, description="Whiten advantages over all tokens of the step.")
    kl_kind: DivergenceKind = Field("low_variance", description="Estimator of the divergence from the reference.")
    kl_reward_coefficient: float = Field(0.0, ge=0, description="Of KL(old, reference) in the token rewards.")
    kl_loss_coefficient: float = Field(0.0, ge=0, description="Of KL(current, reference) in the loss.")
    unbiased_kl: bool = Field(False, description="Multiply that KL by the ratio current / anchor.")
    entropy_coefficient: float = Field(0.0, ge=0, description="Of the entropy bonus.")
    weight_low: float = Field(0.0, ge=0, description="Lower bound of tis and icepop weights.")
    weight_high: float = Field(2.0, gt=0, description="Upper bound of tis, icepop and decoupled weights.")
    importance: ImportanceSection = ImportanceSection()
    off_policy_delta: float | None = Field(
        None, ge=0, description="Drop bad samples that the policy left by more than this mean log ratio (OPSM)."
    )
    distillation_coefficient: float = Field(0.0, ge=0, description="Of the reverse KL to the teacher in the advantage.")
    reward_weight: float = Field(1.0, ge=0, description="Of the reward's advantage beside the teacher's.")
    teacher_url: str | None = Field(
        None, pattern="^https?://", description="Base URL of the teacher's engine (SGLang's /generate)."
    )
    preference_beta: float = Field(0.1, gt=0, description="dpo: how far the policy may leave the reference.")
    constant_length: int | None = Field(
        None, ge=1, description="Divisor of the reducer constant, in tokens; null is sampling.max_new_tokens."
    )
    overlong_buffer: int | None = Field(
        None, ge=1, description="The reward falls over the last so many tokens before max_new_tokens (DAPO)."
    )
    overlong_factor: float = Field(1.0, ge=0, description="By how much it falls.")
    mask_truncated: bool = Field(False, description="Do not train on responses that were cut at max_new_tokens.")

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, given: Any) -> Any:
        """The values of the name under those that are given, and the anchor and correction that go with them."""
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, dict):
            return given
        whole = {**ALGORITHMS.get(given.get("name", "dapo"), {}), **given}
        needs_old = ("kl_reward_coefficient", "distillation_coefficient", "off_policy_delta")
        if "anchor" not in whole:
            several = isinstance(whole.get("updates"), int) and whole["updates"] > 1
            whole["anchor"] = "old" if several or any(whole.get(key) for key in needs_old) else "current"
        if whole["anchor"] == "engine":
            whole.setdefault("correction", "none")
        return whole

    @property
    def supervised(self) -> bool:
        """Learns from given responses: nothing is sampled, nothing graded."""
        return self.name in ("sft", "dpo")

    @property
    def needs_reference(self) -> bool:
        return bool(self.kl_reward_coefficient or self.kl_loss_coefficient) or self.advantage == "preference"

    @model_validator(mode="after")
    def _fits(self) -> AlgorithmSection:
        for wrong, sentence in self._contradictions():
            if wrong:
                raise ValueError(sentence)
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        token_kl, loss_kl = self.kl_reward_coefficient, self.kl_loss_coefficient
        return [
            (
                self.weight_low > self.weight_high,
                f"weight_low {self.weight_low} is above weight_high {self.weight_high}",
            ),
            (
                bool(token_kl and loss_kl),
                f"kl_reward_coefficient {token_kl} and kl_loss_coefficient {loss_kl} would count the divergence twice; set "
                "one of them to 0",
            ),
            (
                bool(token_kl) and self.advantage in _WITHOUT_TOKEN_REWARDS,
                f"kl_reward_coefficient {token_kl} has no effect on {self.advantage} advantages; set kl_loss_coefficient",
            ),
            (
                self.anchor == "engine" and self.correction != "none",
                f"with the anchor engine {self.correction} has nothing to correct; choose one of both",
            ),
            (
                self.anchor == "current" and bool(token_kl or self.distillation_coefficient or self.off_policy_delta),
                "with the anchor current nothing is scored before the step, but kl_reward_coefficient, "
                "distillation_coefficient and off_policy_delta need it; use the anchor old",
            ),
            (
                self.anchor == "current" and self.updates > 1 and not self.supervised,
                f"with the anchor current the ratio is 1 in all {self.updates} updates of a batch and nothing is clipped; "
                "use the anchor old",
            ),
            (
                self.dual_clip is not None and self.loss != "clip",
                f"dual_clip has no effect on the {self.loss} loss; use the loss clip or leave it out",
            ),
            (
                bool(self.distillation_coefficient) and self.teacher_url is None,
                "distillation_coefficient needs a teacher: set teacher_url",
            ),
        ]
