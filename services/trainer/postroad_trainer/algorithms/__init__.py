"""The mathematics of a step as pure functions on tensors, one idea a file; each names its formula and its source."""

from postroad_trainer.algorithms.advantages import grpo_advantages
from postroad_trainer.algorithms.corrections import truncated_importance_weights
from postroad_trainer.algorithms.divergences import kl_k3
from postroad_trainer.algorithms.losses import ClippedLoss, clipped_policy_loss
from postroad_trainer.algorithms.reducers import token_weights

__all__ = [
    "ClippedLoss",
    "clipped_policy_loss",
    "grpo_advantages",
    "kl_k3",
    "token_weights",
    "truncated_importance_weights",
]
