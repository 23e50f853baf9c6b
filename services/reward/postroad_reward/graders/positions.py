"""`positions`: the share of the label's positions at which the response has the same character (or word).

The dense reward of the tiny copying and sorting tasks, whose models start from random weights and never guess a whole
answer. Only the first positions of the response count; what comes after them is not looked at.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from postroad_reward.graders.base import Attempt, Grade, Grader, Settings


class PositionsSettings(Settings):
    unit: Literal["character", "word"] = Field("character", description="What one position holds.")
    same_kind: float = Field(
        0.0, ge=0, lt=1, description="What a wrong character is worth where it is a digit as the right one is."
    )


def grade(attempt: Attempt, settings: PositionsSettings) -> Grade:
    label = _units(attempt.label, settings)
    if not label:
        raise ValueError(f"the positions grader needs a label with at least one {settings.unit}, not {attempt.label!r}")
    response = _units(attempt.response, settings)
    pairs = list(zip(response, label, strict=False))
    equal = sum(mine == theirs for mine, theirs in pairs)
    kind = sum(mine != theirs and mine.isdigit() and theirs.isdigit() for mine, theirs in pairs)
    return Grade((equal + settings.same_kind * kind) / len(label), {"exact": float(response == label)})


def _units(value: object, settings: PositionsSettings) -> list[str]:
    words = ("" if value is None else str(value)).split()
    return words if settings.unit == "word" else list("".join(words))


GRADER = Grader("positions", PositionsSettings, grade)
