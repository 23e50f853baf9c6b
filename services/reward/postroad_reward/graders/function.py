"""`function`: the user's own function by dotted path, plain or async.

It is called with those of the keyword arguments `prompt` (chat messages), `response` (text), `label` and `metadata`
that it names, and returns a number or a mapping with `reward` and further numbers, which become metrics.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field

from postroad_reward.errors import GraderSettingsError, InvalidReward
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings

_ARGUMENTS = ("prompt", "response", "label", "metadata")


class FunctionSettings(Settings):
    path: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", description="Dotted path, as in package.module.name.")


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


async def grade(attempt: Attempt, settings: FunctionSettings) -> Grade:
    function = resolve(settings.path)
    result = function(**_arguments(function, attempt))
    return as_grade(await result if inspect.isawaitable(result) else result)


def as_grade(result: Any) -> Grade:
    if not isinstance(result, Mapping):
        return Grade(result)
    if "reward" not in result:
        raise InvalidReward(f"the function returned a mapping without 'reward', with {sorted(map(str, result))}")
    nested = result.get("metrics") or {}
    plain = {name: value for name, value in result.items() if name not in ("reward", "metrics")}
    return Grade(result["reward"], {**plain, **nested})


def _arguments(function: Callable[..., Any], attempt: Attempt) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    wanted = {parameter.name for parameter in parameters}
    return {name: getattr(attempt, name) for name in _ARGUMENTS if everything or name in wanted}


GRADER = Grader("function", FunctionSettings, grade, prepare=lambda settings: resolve(settings.path))
