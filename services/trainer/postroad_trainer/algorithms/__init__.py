"""The mathematics of a step as pure functions on tensors, one idea a file; each names its formula and its source.

parts              what an algorithm chooses from, in the order of a step; start here (names and numbers: postroad.config)
objective          a step put together: advantages, reducer weights, loss of a micro-batch
errors             what can be wrong with the numbers
segments           packed tokens of samples, their masks and sums
log_probabilities  which log-probabilities enter where
groups             GRPO, Dr.GRPO, RLOO, DPO, each execution counted once
returns            REINFORCE++ and its baseline;  critic: GAE, value loss
whitening          over the whole step and its ranks
ratios, losses     clip, dual clip, GSPO, CISPO, weighted (SFT, DPO)
divergences        k1, k2, k3, low variance, unbiased
corrections        TIS, IcePop, decoupled PPO, OPSM;  rejection: MIS, rejection, veto
diagnostics        effective sample size, mismatch of engine and trainer
reducers           per token, per sample, constant
dapo               over-length shaping
distillation       on-policy distillation
"""

from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.log_probabilities import LogProbabilities, Role
from postroad_trainer.algorithms.objective import advantages_of_step, policy_objective, weights_of_step
from postroad_trainer.algorithms.parts import Rewarded, generalised, require_parts
from postroad_trainer.algorithms.segments import Segments

__all__ = [
    "AlgorithmError",
    "LogProbabilities",
    "Rewarded",
    "Role",
    "Segments",
    "advantages_of_step",
    "generalised",
    "policy_objective",
    "require_parts",
    "weights_of_step",
]
