"""`function`: the user's own function by dotted path, plain or async.

It is called with those of the keyword arguments `prompt` (chat messages), `response` (text), `label` and `metadata`
that it names, and returns a number or a mapping with `reward` and further numbers, which become metrics.

With `group` it is called once for all attempts of a group, with `responses` (a list of texts, by member) in the place of
`response`, and returns a list of the same length.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field

from postroad_reward.errors import GraderSettingsError, InvalidReward
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings


class FunctionSettings(Settings):
    path: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", description="Dotted path, as in package.module.name.")
    group: bool = Field(False, description="Called once per group, with all its responses.")


def resolve(path: str) -> Callable[..., Any]:
    """The function at `path`. Raises GraderSettingsError where there is none or it can't be called as said above."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise GraderSettingsError(f"there is no function {path}: {error}") from error
    if not callable(function):
        raise GraderSettingsError(f"{path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


async def grade(given: Attempt | list[Attempt], settings: FunctionSettings) -> Grade | list[Grade]:
    function = resolve(settings.path)
    attempts = given if isinstance(given, list) else [given]
    result = function(**_arguments(function, attempts, group=settings.group))
    if inspect.isawaitable(result):
        result = await result
    if not settings.group:
        return as_grade(result)
    if not isinstance(result, Sequence) or len(result) != len(attempts):
        got = f"{len(result)} values" if isinstance(result, Sequence) else f"a {type(result).__name__}"
        raise InvalidReward(f"the function returned {got} for a group of {len(attempts)}")
    return [as_grade(item) for item in result]


def as_grade(result: Any) -> Grade:
    if not isinstance(result, Mapping):
        return Grade(result)
    if "reward" not in result:
        raise InvalidReward(f"the function returned a mapping without 'reward', with {sorted(map(str, result))}")
    nested = result.get("metrics") or {}
    plain = {name: value for name, value in result.items() if name not in ("reward", "metrics")}
    return Grade(result["reward"], {**plain, **nested})


def _arguments(function: Callable[..., Any], attempts: list[Attempt], *, group: bool) -> dict[str, Any]:
    first = attempts[0]
    given = {"prompt": first.prompt, "label": first.label, "metadata": first.metadata}
    given |= {"responses": [attempt.response for attempt in attempts]} if group else {"response": first.response}
    parameters = inspect.signature(function).parameters.values()
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    wanted = {parameter.name for parameter in parameters}
    return {name: value for name, value in given.items() if everything or name in wanted}


GRADER = Grader(
    "function",
    FunctionSettings,
    grade,
    prepare=lambda settings: resolve(settings.path),
    group=lambda settings: settings.group,
)
