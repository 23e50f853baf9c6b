"""`python -m postroad_trainer`: one trainer rank, started by the supervisor or a container."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_trainer.algorithms import AlgorithmError
from postroad_trainer.backend import BackendError
from postroad_trainer.batch import RowError
from postroad_trainer.checkpoint import CheckpointError
from postroad_trainer.data import DataError
from postroad_trainer.ledger import FilterExhausted
from postroad_trainer.models import ModelError
from postroad_trainer.plug_points import PlugPointError
from postroad_trainer.ranks import follow, rank
from postroad_trainer.retrain import Divergence
from postroad_trainer.service import NotFiniteGradients, TrainerService

TERMINATED = 143


async def serve(environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    logging.getLogger("megatron").setLevel(logging.WARNING)
    if rank() > 0:
        for number in (signal.SIGTERM, signal.SIGINT):  # a follower has nothing to leave in order
            asyncio.get_running_loop().remove_signal_handler(number)
        follow(recipe, environment.model)
        return
    run = asyncio.ensure_future(TrainerService(environment, recipe).run())
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((run, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not run.done():
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        sys.exit(TERMINATED)
    run.result()


if __name__ == "__main__":
    sys.exit(
        run_service(
            "trainer",
            serve,
            BackendError,
            RowError,
            CheckpointError,
            DataError,
            FilterExhausted,
            ModelError,
            Divergence,
            AlgorithmError,
            PlugPointError,
            NotFiniteGradients,
        )
    )
