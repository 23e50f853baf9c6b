"""`python -m postroad_rollout.worker`: one rollout worker, started by the supervisor or a container."""

from __future__ import annotations

import asyncio
import sys

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_rollout.worker.agents import make_agent
from postroad_rollout.worker.errors import AgentSettingsError
from postroad_rollout.worker.service import WorkerService


async def serve(environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    agent = make_agent(recipe.rollout.agent)  # settings that can't be used end the process here
    if hasattr(agent, "check"):
        agent.check(recipe)
    await WorkerService(environment, recipe).run(stop)


if __name__ == "__main__":
    sys.exit(run_service("worker", serve, AgentSettingsError))
