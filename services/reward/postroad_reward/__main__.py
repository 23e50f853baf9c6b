"""`python -m postroad_reward`: one reward service, started by the supervisor or a container.

`python -m postroad_reward check GRADER SETTINGS_AS_JSON` only looks at settings, for `postroad recipe check`.
"""

from __future__ import annotations

import asyncio
import json
import sys

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_reward.errors import GraderFailed, GraderSettingsError, UnknownGrader
from postroad_reward.graders import check
from postroad_reward.sandbox import SandboxUnavailable
from postroad_reward.service import RewardService


async def serve(environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    check(recipe.reward.grader, dict(recipe.reward.settings))
    try:
        await RewardService(environment, recipe).run(stop)
    except GraderFailed as error:
        if error.settings:
            raise GraderSettingsError(str(error)) from error
        raise


def check_settings(grader: str, settings: str) -> int:
    """Whether there is such a grader with such settings (JSON); the fault goes to standard error."""
    try:
        check(grader, json.loads(settings))
    except (UnknownGrader, GraderSettingsError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        sys.exit(check_settings(*sys.argv[2:4]))
    sys.exit(run_service("reward", serve, UnknownGrader, GraderSettingsError, SandboxUnavailable))
