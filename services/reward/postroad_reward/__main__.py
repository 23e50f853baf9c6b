"""`python -m postroad_reward`: one reward service, started by the supervisor or a container.

`python -m postroad_reward check RECIPE_AS_JSON` only looks at the grader and the tools, for `postroad recipe check`.
"""

from __future__ import annotations

import asyncio
import sys

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_reward.errors import GraderFailed, GraderSettingsError, UnknownGrader
from postroad_reward.graders import check
from postroad_reward.sandbox import SandboxUnavailable
from postroad_reward.service import RewardService
from postroad_reward.tools.base import ToolSettingsError
from postroad_reward.tools.service import ToolService, check_tools

FAULTS = (UnknownGrader, GraderSettingsError, ToolSettingsError, SandboxUnavailable)


async def serve(environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    check(recipe.reward.grader, dict(recipe.reward.settings))
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(RewardService(environment, recipe).run(stop))
            if recipe.tools:
                group.create_task(ToolService(environment, recipe).run(stop))
    except ExceptionGroup as errors:
        error = errors.exceptions[0]
        if isinstance(error, GraderFailed) and error.settings:
            raise GraderSettingsError(str(error)) from error
        raise error from errors


def check_settings(recipe: Recipe) -> int:
    """Whether there are such a grader and such tools; the fault goes to standard error."""
    try:
        if recipe.reward.grader != "none":
            check(recipe.reward.grader, dict(recipe.reward.settings))
        check_tools(recipe.tools)
    except FAULTS as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        sys.exit(check_settings(Recipe.model_validate_json(sys.argv[2])))
    sys.exit(run_service("reward", serve, *FAULTS))
