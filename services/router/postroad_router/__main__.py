"""`python -m postroad_router`: one router, started by the supervisor or a container."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_router.model import ModelFolderError
from postroad_router.service import RouterService


async def serve(environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    await RouterService(environment, recipe).run(stop)


if __name__ == "__main__":
    sys.exit(run_service("router", serve, ModelFolderError, loop=uvloop.new_event_loop))
