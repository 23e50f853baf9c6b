"""Held-out accuracy through the same road: greedy tasks for a version, graded as all others, never trained on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from postroad.bus import AlreadyPublished, Bus
from postroad.config import Recipe
from postroad.config.recipe import EvaluationSection
from postroad.messages import Sample
from postroad.store import Store
from postroad_trainer.data import Dataset, Row
from postroad_trainer.feeder import evaluation_group, evaluation_task

logger = logging.getLogger(__name__)

GRACE_S = 30.0


@dataclass
class Evaluator:
    """Runs the recipe's evaluations: greedy accuracy, or the `loss` of given answers. `results` and `failed` are filled by
    whoever reads the logs."""

    bus: Bus
    store: Store
    recipe: Recipe
    data: dict[str, Dataset]
    loss: Callable[[list[Row]], Awaitable[float]] | None = None
    results: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, sample: Sample) -> None:
        self.results[sample.group] = sample.reward
        self.changed.set()

    def fail(self, group: str, reason: str) -> None:
        self.failed[group] = reason
        self.changed.set()

    def due(self, version: int, steps: int) -> list[EvaluationSection]:
        return [
            evaluation
            for evaluation in self.recipe.evaluation
            if version in (0, steps) or (evaluation.every and version % evaluation.every == 0)
        ]

    async def run(self, version: int, steps: int) -> dict[str, float]:
        """Accuracy or loss by evaluation name, of those that are due at `version` and not done yet. All of them at once."""
        due = [e for e in self.due(version, steps) if not await self._done(e, version)]
        values = await asyncio.gather(*(self._evaluate(evaluation, version) for evaluation in due))
        return {evaluation.name: value for evaluation, value in zip(due, values, strict=True)}

    async def _done(self, evaluation: EvaluationSection, version: int) -> bool:
        return str(version) in (await self.store.get(f"evaluation:{evaluation.name}") or {})

    async def _evaluate(self, evaluation: EvaluationSection, version: int) -> float:
        if self.loss is not None:
            rows_of_loss = self.data[evaluation.name].rows[: evaluation.rows]
            return await self._record(
                evaluation, version, "loss", await self.loss(list(rows_of_loss)), len(rows_of_loss)
            )
        data = self.data[evaluation.name]
        rows = range(min(evaluation.rows, len(data)))
        groups = [evaluation_group(version, evaluation.name, row) for row in rows]
        for row, group in zip(rows, groups, strict=True):
            earlier = await self.bus.last("SAMPLES", self.bus.subjects.sample(group, 0))
            if earlier is not None and isinstance(earlier.message, Sample):
                self.add(earlier.message)
                continue
            task = evaluation_task(self.recipe, self.bus.subjects.run, evaluation, data.row(row), group, version)
            try:
                await self.bus.publish(self.bus.subjects.task(group), task, once=True)
            except AlreadyPublished:
                logger.info("evaluation task %s is on its way already", group)
        await self._wait(groups)
        graded = [self.results[group] for group in groups if group in self.results]
        if len(graded) < len(groups):
            logger.warning("evaluation %s at version %d: %d of %d rows failed: %s", evaluation.name, version,
                           len(groups) - len(graded), len(groups), self.failed)  # fmt: skip
        accuracy = sum(graded) / len(graded) if graded else float("nan")
        return await self._record(evaluation, version, "accuracy", accuracy, len(graded))

    async def _record(self, evaluation: EvaluationSection, version: int, name: str, value: float, rows: int) -> float:
        document = await self.store.get(f"evaluation:{evaluation.name}") or {}
        document[str(version)] = {name: value, "rows": rows, "step": version}
        await self.store.set(f"evaluation:{evaluation.name}", document)
        return value

    async def _wait(self, groups: list[str]) -> None:
        end = time.monotonic() + self.recipe.rollout.deadline_s + GRACE_S
        while any(group not in self.results and group not in self.failed for group in groups):
            if time.monotonic() > end:
                return
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), 1.0)
            except TimeoutError:
                continue
