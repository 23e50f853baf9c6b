"""The mathematics of a step as pure functions on tensors, one idea a file; each names its formula and its source.

registry           the algorithms by name and the design; start here;  parts: what they choose from
objective          a step put together: advantages, reducer weights, loss of a micro-batch
settings, errors   the numbers; what can be wrong with them
segments           packed tokens of samples, their masks and sums
log_probabilities  which log-probabilities enter where
rewarded           what advantages are made from
groups             GRPO, Dr.GRPO, RLOO, each execution counted once;  advantages: the same from a table
returns            REINFORCE++ and its baseline
critic             GAE, value loss
whitening          over the whole step and its ranks
ratios, losses     clip, dual clip, GSPO, CISPO
divergences        k1, k2, k3, low variance, unbiased
corrections        TIS, IcePop, decoupled PPO, OPSM;  rejection: MIS, rejection, veto
diagnostics        effective sample size, mismatch of engine and trainer
entropy, masks     also of a split vocabulary; samples that aren't trained
reducers           per token, per sample, constant
dapo               dynamic sampling, over-length shaping
supervised         SFT, DPO
distillation       on-policy distillation
"""

from postroad_trainer.algorithms.advantages import grpo_advantages
from postroad_trainer.algorithms.corrections import truncated_importance_weights
from postroad_trainer.algorithms.divergences import kl_k3
from postroad_trainer.algorithms.errors import AlgorithmError
from postroad_trainer.algorithms.log_probabilities import LogProbabilities
from postroad_trainer.algorithms.losses import ClippedLoss, clipped_policy_loss
from postroad_trainer.algorithms.objective import advantages_of_step, policy_objective, weights_of_step
from postroad_trainer.algorithms.reducers import token_weights
from postroad_trainer.algorithms.registry import ALGORITHMS, Algorithm
from postroad_trainer.algorithms.rewarded import Rewarded
from postroad_trainer.algorithms.segments import Segments
from postroad_trainer.algorithms.settings import AlgorithmSettings

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmError",
    "AlgorithmSettings",
    "ClippedLoss",
    "LogProbabilities",
    "Rewarded",
    "Segments",
    "advantages_of_step",
    "clipped_policy_loss",
    "grpo_advantages",
    "kl_k3",
    "policy_objective",
    "token_weights",
    "truncated_importance_weights",
    "weights_of_step",
]
