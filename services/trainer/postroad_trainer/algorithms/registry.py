"""The algorithms by name: what a step is made of.

A step runs these in order; each part is a function that can be replaced by another of its signature:

1. advantage   Rewarded (the whole step) -> [N]      advantages_of_step, which then mixes distillation in and whitens
2. reducer     token counts of the whole step -> [S] weights_of_step
3. loss        scores, advantages -> [N] per token   policy_objective, for every micro-batch:
4. correction  scores -> weight, kept [N]            sum of reducer weight x kept x correction weight x loss
                                                     - entropy + KL to the reference

name                         advantage                    loss             correction  reducer   anchor
grpo                         group                        clip             none        sample    old
dr_grpo                      group_mean                   clip             none        constant  old
dapo                         group                        clip (higher)    none        token     old
gspo                         group                        sequence_clip    none        sample    old
cispo                        group                        clipped_weight   none        token     old
rloo                         leave_one_out                clip             none        sample    old
reinforce_plus_plus          reinforce_plus_plus, white   clip             none        sample    old
reinforce_plus_plus_baseline baseline, white              clip             none        sample    old
ppo                          gae (with critic.value_loss) clip             none        sample    old
decoupled_ppo                group                        clip             decoupled   sample    proximal

anchor: the denominator of the ratio (see log_probabilities). Corrections are orthogonal: none, tis, icepop, importance
(masked importance sampling, rejection, veto) and decoupled compare the anchor with the engine, and go with any line by
dataclasses.replace(ALGORITHMS["grpo"], correction="tis"). Bypass is anchor "engine", where corrections have nothing to
correct. Supervised fine-tuning, preferences and the critic have losses of their own (supervised, critic) and use 2 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.log_probabilities import Role
from postroad_trainer.algorithms.parts import ADVANTAGES, CORRECTIONS, LOSSES
from postroad_trainer.algorithms.settings import AlgorithmSettings
from postroad_trainer.batch import Reducer

WITHOUT_TOKEN_REWARDS = ("group", "group_mean", "leave_one_out")


@dataclass(frozen=True)
class Algorithm:
    """One line of the table. Raises AlgorithmError for a name that isn't registered or settings that have no effect."""

    advantage: str
    loss: str = "clip"
    correction: str = "none"
    reducer: Reducer = "sample"
    anchor: Role = "old"
    settings: AlgorithmSettings = field(default_factory=AlgorithmSettings)

    def __post_init__(self) -> None:
        for part, name, names in (
            ("advantage", self.advantage, tuple(ADVANTAGES)),
            ("loss", self.loss, tuple(LOSSES)),
            ("correction", self.correction, tuple(CORRECTIONS)),
            ("reducer", self.reducer, ("sample", "token", "constant")),
            ("anchor", self.anchor, ("old", "engine", "proximal", "current")),
        ):
            if name not in names:
                raise AlgorithmError(f"{part} is {name!r}; one of {', '.join(names)} expected")
        if self.settings.kl_reward_coefficient and self.advantage in WITHOUT_TOKEN_REWARDS:
            raise AlgorithmError(
                f"kl_reward_coefficient {self.settings.kl_reward_coefficient} has no effect on {self.advantage} advantages; "
                "set kl_loss_coefficient instead"
            )
        if self.anchor == "engine" and self.correction != "none":
            raise AlgorithmError(
                f"with the anchor 'engine' {self.correction} has nothing to correct; choose one of both"
            )
        if self.anchor == "current" and (self.settings.kl_reward_coefficient or self.settings.distillation_coefficient):
            raise AlgorithmError(
                "with the anchor 'current' nothing is scored before the step, but kl_reward_coefficient and "
                "distillation_coefficient need it; use the anchor 'old' or set both to 0"
            )
        if self.settings.dual_clip is not None and self.loss != "clip":
            raise AlgorithmError(
                f"dual_clip has no effect on the {self.loss} loss; use the loss 'clip' or leave it out"
            )


_WHITE = AlgorithmSettings(whiten=True)
_GSPO = AlgorithmSettings(clip_low=3e-4, clip_high=4e-4)
# The paper leaves its upper bound open: weights up to 5.
_CISPO = AlgorithmSettings(clip_low=1.0, clip_high=4.0)
ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "grpo": Algorithm("group"),
        "dr_grpo": Algorithm("group_mean", reducer="constant"),
        "dapo": Algorithm("group", reducer="token", settings=AlgorithmSettings(clip_high=0.28)),
        "gspo": Algorithm("group", "sequence_clip", settings=_GSPO),
        "cispo": Algorithm("group", "clipped_weight", reducer="token", settings=_CISPO),
        "rloo": Algorithm("leave_one_out"),
        "reinforce_plus_plus": Algorithm("reinforce_plus_plus", settings=_WHITE),
        "reinforce_plus_plus_baseline": Algorithm("reinforce_plus_plus_baseline", settings=_WHITE),
        "ppo": Algorithm("gae"),
        "decoupled_ppo": Algorithm("group", correction="decoupled", anchor="proximal"),
    }
)
