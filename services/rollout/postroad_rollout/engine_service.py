"""`python -m postroad_rollout.engine_service`: one engine of the mesh, with its registration and its weight puller."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from typing import get_args

from postroad.bus import Bus
from postroad.config import Environment, Recipe, load_recipe
from postroad.store import Store
from postroad.supervisor.processes import die_with_parent
from postroad.telemetry.logging import set_up_logging
from postroad.telemetry.tracer import set_up_tracing
from postroad.weights import Puller
from postroad_rollout.engine.app import create_app
from postroad_rollout.engine.engine import Engine
from postroad_rollout.engine.errors import EngineError
from postroad_rollout.engine.handover import Bootstrap
from postroad_rollout.engine.server import Server
from postroad_rollout.engine.settings import EngineSettings, Role
from postroad_rollout.updates import Updater

HEARTBEAT_S = 1.0
TTL_S = 5.0
FATAL = 3


def settings_of(environment: Environment, recipe: Recipe, role: Role) -> EngineSettings:
    section = recipe.rollout.engine
    return EngineSettings(
        model_path=environment.model, host=environment.host, port=environment.port, dtype=recipe.model.dtype,
        threads=section.threads, slots=section.slots, max_length=section.max_length, max_waiting=section.waiting,
        role=role, seed=recipe.seed, secret=environment.key,
    )  # fmt: skip


async def run(environment: Environment, recipe: Recipe, role: Role) -> None:
    """Serve until SIGTERM. The engine is registered as ready once it serves the newest published version."""
    settings = settings_of(environment, recipe, role)
    name = environment.name or f"engine-{os.getpid()}"
    bus = await Bus.connect(environment.nats_url, environment.run)
    store = await Store.connect(environment.redis_url, environment.run)
    engine = await asyncio.to_thread(Engine, settings)
    engine.start()
    puller = Puller(store, environment.key, name=name)
    await puller.serve(environment.host, environment.advertise)
    updater = Updater(engine, bus, puller, name=name, mode=recipe.rollout.engine.update)
    bootstrap = Bootstrap(settings.secret)
    bootstrap_port = await bootstrap.open(settings.host, 0) if settings.role == "prefill" else None
    server = Server(create_app(engine, bootstrap, updater.current.is_set), settings)
    url = f"http://{environment.advertise or environment.host}:{server.port}"

    async def beat() -> None:
        while True:
            state = "failed" if engine.failure else "ready" if updater.current.is_set() else "pulling"
            info = {
                "url": url, "pid": os.getpid(), "port": server.port, "version": engine.version, "digest": engine.digest,
                "state": state, "slots": settings.slots, "role": settings.role, "bootstrap_port": bootstrap_port,
                **engine.load(), **puller.info(),
            }  # fmt: skip
            await store.register("engine", name, info, TTL_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(updater.switched.wait(), HEARTBEAT_S)
                updater.switched.clear()

    async def watch() -> None:
        await asyncio.to_thread(engine.join)
        if engine.failure is None:
            return
        raise RuntimeError(f"the model's thread failed: {engine.failure!r}")

    tasks = [asyncio.create_task(job) for job in (server.serve_socket(), updater.run(), beat(), watch())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks[1:]:
            task.cancel()
        server.should_exit = True
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.leave("engine", name)
        await bootstrap.close()
        await asyncio.to_thread(engine.close)
        await puller.close()
        await store.close()
        await bus.close()


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(description="One engine of the mesh.")
    parser.add_argument("--role", default="mixed", choices=get_args(Role))
    role = parser.parse_args().role
    environment = Environment.read()
    set_up_logging("engine", environment.run, environment.log_level)
    set_up_tracing("engine", environment.run)
    try:
        asyncio.run(run(environment, load_recipe(environment.recipe), role))
    except EngineError as error:
        print(f"engine: {error}", file=sys.stderr)
        return FATAL
    return 0


if __name__ == "__main__":
    sys.exit(main())
