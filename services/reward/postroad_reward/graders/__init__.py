"""The graders by name, one file each: `math`, `exact`, `positions`, `reasoning_gym` and `function` (the user's own).

A grader is a pure function with typed settings (base.Grader). It runs in a process of its own that may be killed.
To add one, write its file and name it here.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from postroad_reward.errors import GraderSettingsError, UnknownGrader
from postroad_reward.graders import exact, function, math, positions, reasoning_gym
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings, checked_grade

__all__ = ["GRADERS", "Attempt", "Grade", "Grader", "Settings", "check", "checked_grade", "find"]

GRADERS: dict[str, Grader[Any]] = {
    grader.name: grader
    for grader in (math.GRADER, exact.GRADER, positions.GRADER, reasoning_gym.GRADER, function.GRADER)
}


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


def _explain(name: str, grader: Grader[Any], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, grader.settings.model_fields, n=1)
        known = ", ".join(sorted(grader.settings.model_fields)) or "none"
        hint = f"did you mean {near[0]!r}?" if near else f"known: {known}"
        return f"grader {name!r} has no setting {key!r}: {hint}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"setting {key!r} of grader {name!r}: {message} (got {fault['input']!r})"[:300]
