"""`python -m postroad_trainer`: one trainer rank, started by the supervisor, torchrun or a container.

Exit codes: 0 the run is finished; 3 it can't go on as it is configured (the log says why); others: start it again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from postroad.config import Environment, RecipeError, load_recipe
from postroad.supervisor.processes import die_with_parent
from postroad.telemetry.logging import set_up_logging
from postroad.telemetry.tracer import set_up_tracing
from postroad_trainer.ranks import follow, rank

logger = logging.getLogger("postroad_trainer")

FATAL = 3


def main() -> int:
    die_with_parent()
    environment = Environment.read()
    set_up_logging("trainer", environment.run, environment.log_level)
    set_up_tracing("trainer", environment.run)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    from postroad_trainer.backend import BackendError
    from postroad_trainer.batch import RowError
    from postroad_trainer.checkpoint import CheckpointError
    from postroad_trainer.data import DataError
    from postroad_trainer.ledger import FilterExhausted
    from postroad_trainer.models import ModelError
    from postroad_trainer.retrain import Divergence
    from postroad_trainer.service import TrainerService

    fatal = (RecipeError, BackendError, RowError, CheckpointError, DataError, FilterExhausted, ModelError, Divergence)
    try:
        recipe = load_recipe(environment.recipe)
        if rank() > 0:
            follow(recipe, environment.model)
            return 0
        asyncio.run(_lead(TrainerService(environment, recipe)))
    except fatal as error:
        logger.error("%s", error)
        print(f"trainer: {error}", file=sys.stderr)
        return FATAL
    return 0


async def _lead(service: object) -> None:
    task = asyncio.ensure_future(service.run())  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())
