"""`python -m postroad_rollout.worker`: one rollout worker, started by the supervisor or a container.

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
from postroad_rollout.worker.agents import make_agent
from postroad_rollout.worker.errors import AgentSettingsError
from postroad_rollout.worker.service import WorkerService

logger = logging.getLogger("postroad_rollout.worker")

FATAL = 3


def main() -> int:
    die_with_parent()
    environment = Environment.read()
    set_up_logging("worker", environment.run, environment.log_level)
    set_up_tracing("worker", environment.run)
    try:
        recipe = load_recipe(environment.recipe)
        make_agent(recipe.rollout.agent)
        asyncio.run(serve(environment, recipe))
    except (RecipeError, AgentSettingsError) as error:
        logger.error("%s", error)
        print(f"worker: {error}", file=sys.stderr)
        return FATAL
    return 0


async def serve(environment: Environment, recipe: Recipe) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await WorkerService(environment, recipe).run(stop)


if __name__ == "__main__":
    sys.exit(main())
