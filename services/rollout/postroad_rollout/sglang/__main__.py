"""`python -m postroad_rollout.sglang`: one SGLang engine of the mesh."""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import partial
from typing import Any, get_args

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_rollout.engine.settings import Role
from postroad_rollout.membership import Membership
from postroad_rollout.sglang.engine import SGLangEngine
from postroad_rollout.sglang.server import SGLangError, SGLangServer
from postroad_rollout.sglang.weights import serialize


async def serve(role: Role, environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    options = recipe.rollout.engine.sglang.options
    server = SGLangServer(recipe, environment, role=role)
    ranks = int(options.get("tp-size", 1))
    engine = SGLangEngine(server.url, environment.key, serialize, ranks=ranks)
    member = Membership(environment, recipe, engine)
    await member.join()

    def describe() -> dict[str, Any]:
        return {"role": role, "bootstrap_port": server.bootstrap_port, "json_schema": True}

    async def work() -> None:
        server.launch()
        await server.ready()
        async with asyncio.TaskGroup() as group:
            group.create_task(server.watch())
            group.create_task(member.run(server.port, describe))

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait()), asyncio.create_task(work())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.close()
        server.kill()
        await member.leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="mixed", choices=get_args(Role))
    sys.exit(run_service("engine", partial(serve, parser.parse_args().role), SGLangError))
