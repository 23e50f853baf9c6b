"""`multi_agent`: the rewards of a group of the agent multi_agent, in which each role is a member with a reward of its own.

Solvers and rewriters are graded by another grader. A selector earns the reward of the rewrite that its first
`Judgment: NUMBER` names, and nothing where it names none. All rewards of its team are multiplied by `won` where that is
1, else by `lost`. Members that do not make a whole team, such as the solver of an evaluation, keep their rewards.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from postroad_reward.graders.answers import after_thinking
from postroad_reward.graders.base import Attempt, Context, Grade, Grader, Settings

_JUDGMENT = re.compile(r"Judgment:\s*(\d+)")


class MultiAgentSettings(Settings):
    grader: str = Field(description="Of solvers and rewriters.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Of that grader.")
    solvers: int = Field(2, ge=1, description="As in rollout.agent.")
    rewriters: int = Field(2, ge=1, description="As in rollout.agent.")
    won: float = 1.2
    lost: float = 0.8

    @model_validator(mode="after")
    def _valid(self) -> MultiAgentSettings:
        from postroad_reward.graders import check

        check(self.grader, self.settings)
        return self


async def run(attempts: list[Attempt], settings: MultiAgentSettings, context: Context) -> list[Grade]:
    team = settings.solvers + settings.rewriters + 1
    graded = [place for place in range(len(attempts)) if place % team < team - 1]
    given = await context.grade(settings.grader, settings.settings, [attempts[place] for place in graded])
    grades = dict(zip(graded, given, strict=True))
    for selector in range(team - 1, len(attempts), team):
        _judge(selector, attempts[selector].response, grades, settings)
    return [grades[place] for place in range(len(attempts))]


def _judge(selector: int, response: str, grades: dict[int, Grade], settings: MultiAgentSettings) -> None:
    """Gives the selector its grade, and its team theirs."""
    named = _JUDGMENT.search(after_thinking(response))
    number = int(named[1]) if named else 0
    chosen = 0.0
    if 1 <= number <= settings.rewriters:
        chosen = grades[selector - settings.rewriters + number - 1].reward
    grades[selector] = Grade(chosen, {"judged": float(number > 0)})
    factor = settings.won if chosen == 1 else settings.lost
    for place in range(selector - settings.solvers - settings.rewriters, selector + 1):
        grade = grades[place]
        grades[place] = Grade(grade.reward * factor, {**grade.metrics, "alone": grade.reward})


GRADER = Grader("multi_agent", MultiAgentSettings, run=run, group=lambda settings: True)
