"""`combination`: the weighted sum of other graders' rewards, whose metrics carry the part's name.

It is of group scope where one of its parts is: then that part sees the whole group, and the others grade its members.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field, model_validator

from postroad_reward.graders.base import Attempt, Context, Grade, Grader, Settings


class Part(Settings):
    grader: str
    settings: dict[str, Any] = Field(default_factory=dict)
    weight: float = 1.0
    name: str | None = Field(None, description="Name in the metrics; the grader's by itself.")


class CombinationSettings(Settings):
    parts: list[Part] = Field(min_length=1, description="grader, settings, weight (1 by itself) and name of each.")

    @model_validator(mode="after")
    def _valid(self) -> CombinationSettings:
        from postroad_reward.graders import check

        for part in self.parts:
            check(part.grader, part.settings)
        names = [part.name or part.grader for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"two parts have one name: {names}; give them names")
        return self


async def run(attempts: list[Attempt], settings: CombinationSettings, context: Context) -> list[Grade]:
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(context.grade(part.grader, part.settings, attempts)) for part in settings.parts]
    columns = [task.result() for task in running]
    return [_sum(settings.parts, [column[row] for column in columns]) for row in range(len(attempts))]


def _sum(parts: list[Part], grades: list[Grade]) -> Grade:
    metrics: dict[str, float] = {}
    for part, grade in zip(parts, grades, strict=True):
        name = part.name or part.grader
        metrics |= {name: grade.reward, **{f"{name}_{key}": value for key, value in grade.metrics.items()}}
    return Grade(sum(part.weight * grade.reward for part, grade in zip(parts, grades, strict=True)), metrics)


def _group(settings: CombinationSettings) -> bool:
    from postroad_reward.graders import check, find

    return any(find(part.grader).group(check(part.grader, part.settings)) for part in settings.parts)


GRADER = Grader("combination", CombinationSettings, run=run, group=_group)
