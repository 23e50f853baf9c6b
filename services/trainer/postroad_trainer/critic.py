"""PPO's critic: a model and an optimizer of its own, which learn what is still to come of the reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from postroad.config.algorithm import AlgorithmSection
from postroad_trainer.backend import BackendSettings, MegatronBackend
from postroad_trainer.batch import StepSettings, TrainRow


class Critic:
    """Starts as the policy's model with a value head of 0. Every method is called on all ranks, in the same order."""

    def __init__(self, settings: BackendSettings, algorithm: AlgorithmSection) -> None:
        self._backend = MegatronBackend(settings, critic=True)
        changes = {"loss": "value", "correction": "none", "value_clip": algorithm.value_clip}
        self._algorithm = AlgorithmSection.model_validate({"name": "grpo", **changes})
        self._learning_rate = algorithm.critic_learning_rate

    def valued(self, rows: Sequence[TrainRow]) -> list[TrainRow]:
        """The rows with the values of the states before their trained tokens."""
        values = self._backend.logprobs(_bare(rows))
        return [
            dataclasses.replace(row, scores={**row.scores, "value": value})
            for row, value in zip(rows, values, strict=True)
        ]

    def learn(self, rows: Sequence[TrainRow], settings: StepSettings, warmup: float) -> dict[str, float]:
        """One update to the rows' returns, which are in the place of their advantages; its numbers."""
        rate = self._learning_rate * warmup
        result = self._backend.train_step(
            _bare(rows), dataclasses.replace(settings, algorithm=self._algorithm, learning_rate=rate)
        )
        returns = np.concatenate([np.broadcast_to(row.advantage, row.tokens.shape)[row.trained] for row in rows])
        left = returns - np.concatenate([row.scores["value"][row.trained] for row in rows])
        numbers = {"critic_loss": result.loss, "critic_grad_norm": result.grad_norm or 0.0}
        if len(returns) and returns.std() > 0:
            numbers["critic_explained_variance"] = float(1 - left.var() / returns.var())
        return numbers

    def save(self, folder: Path) -> None:
        self._backend.save(folder)

    def load(self, folder: Path) -> None:
        self._backend.load(folder)


def _bare(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The recorded experts are the policy's, not the critic's."""
    return [dataclasses.replace(row, routed_experts=None) for row in rows]
