"""`python -m postroad_reward`: one reward service, started by the supervisor or a container."""

from __future__ import annotations

import asyncio
import sys

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_reward.errors import GraderFailed, GraderSettingsError, UnknownGrader
from postroad_reward.graders import check
from postroad_reward.service import RewardService


async def serve(environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    check(recipe.reward.grader, dict(recipe.reward.settings))
    try:
        await RewardService(environment, recipe).run(stop)
    except GraderFailed as error:
        if error.settings:
            raise GraderSettingsError(str(error)) from error
        raise


if __name__ == "__main__":
    sys.exit(run_service("reward", serve, UnknownGrader, GraderSettingsError))
