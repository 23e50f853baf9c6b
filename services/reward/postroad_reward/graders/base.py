"""What a grader is: a function of an attempt, or of all attempts of a group, and its typed settings."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Generic, Protocol, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict

from postroad_reward.errors import InvalidReward
from postroad_reward.sandbox.models import Job, Result


class Settings(BaseModel):
    """A grader's own settings. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Attempt:
    """What is graded: the response to `prompt` (chat messages), which took `tokens` tokens, with the row's `label` and
    `metadata`."""

    prompt: list[dict[str, Any]]
    response: str
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True)
class Grade:
    reward: float
    metrics: dict[str, float] = field(default_factory=dict)


S = TypeVar("S", bound=Settings)


class Context(Protocol):
    """What the service gives to graders that run in it."""

    @property
    def http(self) -> httpx.AsyncClient: ...

    async def run(self, job: Job) -> Result:
        """Run a job in the sandbox. Raises SandboxLost."""

    async def grade(self, grader: str, settings: dict[str, Any], attempts: list[Attempt]) -> list[Grade]:
        """Grade by another grader."""


@dataclass(frozen=True)
class Grader(Generic[S]):
    """`grade` runs in a process that may be killed: it may take any time and memory. `run` is for graders that wait for
    others (a sandbox, a judge): it runs in the service and must not block. Both may raise: that is a failure of the
    grader, never a reward. `group` says whether all attempts of a group are graded in one call, as a list.
    `prepare` imports what the first grading would otherwise wait for."""

    name: str
    settings: type[S]
    grade: Callable[[Any, S], Any] | None = None
    run: Callable[[list[Attempt], S, Context], Awaitable[list[Grade]]] | None = None
    prepare: Callable[[S], object] = lambda settings: None
    group: Callable[[S], bool] = lambda settings: False
    sandbox: bool = False


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
