"""What a grader is: a pure function of an attempt and its typed settings."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from postroad_reward.errors import InvalidReward


class Settings(BaseModel):
    """A grader's own settings. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Attempt:
    """What is graded: the response to `prompt` (chat messages), with the row's `label` and `metadata`."""

    prompt: list[dict[str, Any]]
    response: str
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    reward: float
    metrics: dict[str, float] = field(default_factory=dict)


S = TypeVar("S", bound=Settings)
Result = Grade | float


@dataclass(frozen=True)
class Grader(Generic[S]):
    """`grade(attempt, settings)` may raise: that is a failure of the grader, never a reward. `prepare` imports what
    the first grading would otherwise wait for."""

    name: str
    settings: type[S]
    grade: Callable[[Attempt, S], Result | Awaitable[Result]]
    prepare: Callable[[S], object] = lambda settings: None


def checked_grade(result: Any) -> Grade:
    """`result` as a grade of finite floats. Raises InvalidReward with the value."""
    if not isinstance(result, Grade):
        result = Grade(result)
    metrics = {str(name): _number(value, f"metric {name!r}") for name, value in result.metrics.items()}
    return Grade(_number(result.reward, "reward"), metrics)


def _number(value: Any, what: str) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidReward(f"the {what} must be a finite number, not {value!r}"[:300])
    return float(value)
