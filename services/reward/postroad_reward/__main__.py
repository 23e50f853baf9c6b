"""`python -m postroad_reward`: one reward service, started by the supervisor or a container.

Exit codes: 0 it was told to stop; 3 it can't go on as it is configured (the log says why); others: start it again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from postroad.config import Environment, Recipe, RecipeError, load_recipe
from postroad.supervisor.processes import die_with_parent
from postroad.telemetry.logging import set_up_logging
from postroad.telemetry.tracer import set_up_tracing
from postroad_reward.errors import GraderFailed, GraderSettingsError, UnknownGrader
from postroad_reward.graders import check
from postroad_reward.service import RewardService

logger = logging.getLogger("postroad_reward")

FATAL = 3


def main() -> int:
    die_with_parent()
    environment = Environment.read()
    set_up_logging("reward", environment.run, environment.log_level)
    set_up_tracing("reward", environment.run)
    try:
        recipe = load_recipe(environment.recipe)
        check(recipe.reward.grader, dict(recipe.reward.settings))
        asyncio.run(serve(environment, recipe))
    except (RecipeError, UnknownGrader, GraderSettingsError) as error:
        return _fatal(error)
    except GraderFailed as error:
        if not error.settings:
            raise
        return _fatal(error)
    return 0


def _fatal(error: Exception) -> int:
    logger.error("%s", error)
    print(f"reward: {error}", file=sys.stderr)
    return FATAL


async def serve(environment: Environment, recipe: Recipe) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await RewardService(environment, recipe).run(stop)


if __name__ == "__main__":
    sys.exit(main())
