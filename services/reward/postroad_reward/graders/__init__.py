"""The graders by name. Most are pure functions with typed settings, in processes that may be killed; those that wait for
a sandbox, a judge or other graders run in the service (base.Grader). To add one, write its file and name it here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from postroad_reward.errors import GraderSettingsError, UnknownGrader
from postroad_reward.graders import (
    code,
    combination,
    dapo,
    deepscaler,
    exact,
    f1,
    function,
    instructions,
    judging,
    math,
    multi_agent,
    multiple_choice,
    positions,
    reasoning_gym,
    shape,
)  # fmt: skip
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings, checked_grade

__all__ = ["GRADERS", "Attempt", "Grade", "Grader", "Settings", "check", "checked_grade", "find", "parts_of"]

GRADERS: dict[str, Grader[Any]] = {
    grader.name: grader
    for grader in (
        math.GRADER, deepscaler.GRADER, dapo.GRADER, multiple_choice.GRADER, exact.GRADER, f1.GRADER, positions.GRADER,
        instructions.GRADER, code.GRADER, reasoning_gym.GRADER, shape.FORMAT, shape.LENGTH, shape.JSON_SCHEMA,
        judging.JUDGE, judging.REMOTE, function.GRADER, combination.GRADER, multi_agent.GRADER,
    )
}  # fmt: skip


def find(name: str) -> Grader[Any]:
    """The grader called `name`. Raises UnknownGrader with the nearest name."""
    if name in GRADERS:
        return GRADERS[name]
    near = difflib.get_close_matches(name, GRADERS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(GRADERS))}"
    raise UnknownGrader(f"there is no grader {name!r}: {hint}")


def check(name: str, settings: dict[str, Any]) -> Settings:
    """The validated settings of grader `name`: the check of reward.grader and reward.settings of a recipe.
    Raises UnknownGrader or GraderSettingsError, in a sentence."""
    grader = find(name)
    try:
        valid: Settings = grader.settings.model_validate(settings)
    except ValidationError as error:
        raise GraderSettingsError("\n".join(_explain(name, grader, fault) for fault in error.errors())) from error
    return valid


def parts_of(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The grader, or those that it is made of, with their settings."""
    if name == multi_agent.GRADER.name:
        team = multi_agent.MultiAgentSettings.model_validate(settings)
        yield from parts_of(team.grader, team.settings)
    elif name == combination.GRADER.name:
        for part in combination.CombinationSettings.model_validate(settings).parts:
            yield from parts_of(part.grader, part.settings)
    else:
        yield name, settings


def _explain(name: str, grader: Grader[Any], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, grader.settings.model_fields, n=1)
        known = ", ".join(sorted(grader.settings.model_fields)) or "none"
        hint = f"did you mean {near[0]!r}?" if near else f"known: {known}"
        return f"grader {name!r} has no setting {key!r}: {hint}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"setting {key!r} of grader {name!r}: {message} (got {fault['input']!r})"[:300]
