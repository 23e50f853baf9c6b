"""`python -m postroad_rollout.sglang`: one SGLang engine of the mesh, with its registration and its weight puller."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from functools import partial
from typing import get_args

from postroad.bus import Bus
from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad.store import Store
from postroad.weights import Puller
from postroad_rollout.sglang.engine import SGLangEngine
from postroad_rollout.sglang.server import Role, SGLangError, SGLangServer
from postroad_rollout.sglang.weights import serialize
from postroad_rollout.updates import Updater

HEARTBEAT_S = 1.0
TTL_S = 5.0


async def serve(role: Role, environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    """Serve until told to stop. The engine is registered as ready once it serves the newest published version."""
    section = recipe.rollout.engine
    name = environment.name or f"engine-{os.getpid()}"
    server = SGLangServer(recipe, environment, role=role)
    bus = await Bus.connect(environment.nats_url, environment.run)
    store = await Store.connect(environment.redis_url, environment.run)
    ranks = int(section.sglang.options.get("tp-size", section.sglang.options.get("tp_size", 1)))
    engine = SGLangEngine(server.url, environment.key, serialize, ranks=ranks)
    updater = Updater(engine, bus, Puller(store, environment.key), name=name, mode=section.update)
    url = f"http://{environment.advertise or environment.host}:{server.port}"

    async def beat() -> None:
        while True:
            info = {
                "url": url, "pid": os.getpid(), "port": server.port, "version": engine.version, "digest": engine.digest,
                "state": "ready" if updater.current.is_set() else "pulling", "slots": section.slots,
                "role": role, "bootstrap_port": server.bootstrap_port,
            }  # fmt: skip
            await store.register("engine", name, info, TTL_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(updater.switched.wait(), HEARTBEAT_S)
                updater.switched.clear()

    async def work() -> None:
        server.launch()
        await server.ready()
        async with asyncio.TaskGroup() as group:
            for job in (server.watch(), updater.run(), beat()):
                group.create_task(job)

    tasks: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait()), asyncio.create_task(work())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.leave("engine", name)
        engine.close()
        server.kill()
        await store.close()
        await bus.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="mixed", choices=get_args(Role))
    sys.exit(run_service("engine", partial(serve, parser.parse_args().role), SGLangError))
