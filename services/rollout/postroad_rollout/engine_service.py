"""`python -m postroad_rollout.engine_service`: one embedded engine of the mesh."""

from __future__ import annotations

import argparse
import asyncio
import sys
from functools import partial
from typing import Any, get_args

from postroad.config import Environment, Recipe
from postroad.service import run_service
from postroad_rollout.engine.app import create_app
from postroad_rollout.engine.engine import Engine
from postroad_rollout.engine.errors import EngineError
from postroad_rollout.engine.handover import Bootstrap
from postroad_rollout.engine.server import Server
from postroad_rollout.engine.settings import EngineSettings, Role
from postroad_rollout.membership import Membership


def settings_of(environment: Environment, recipe: Recipe, role: Role) -> EngineSettings:
    section = recipe.rollout.engine
    return EngineSettings(
        model_path=environment.model, host=environment.host, port=environment.port, dtype=recipe.model.dtype,
        threads=section.threads, slots=section.slots, max_length=section.max_length, max_waiting=section.waiting,
        role=role, seed=recipe.seed, secret=environment.key,
    )  # fmt: skip


async def serve(role: Role, environment: Environment, recipe: Recipe, stop: asyncio.Event) -> None:
    settings = settings_of(environment, recipe, role)
    engine = await asyncio.to_thread(Engine, settings)
    member = Membership(environment, recipe, engine)
    await member.join()
    engine.start()
    bootstrap = Bootstrap(settings.secret)
    bootstrap_port = await bootstrap.open(settings.host, 0) if settings.role == "prefill" else None
    server = Server(create_app(engine, bootstrap, member.ready), settings)

    def describe() -> dict[str, Any]:
        failed = {"state": "failed"} if engine.failure else {}
        return {"role": settings.role, "bootstrap_port": bootstrap_port, **engine.load(), **failed}

    async def watch() -> None:
        await asyncio.to_thread(engine.join)
        if engine.failure is not None:
            raise RuntimeError(f"the model's thread failed: {engine.failure!r}")

    serving = asyncio.create_task(server.serve_socket())
    others = [asyncio.create_task(job) for job in (stop.wait(), member.run(server.port, describe), watch())]
    try:
        done, _ = await asyncio.wait([serving, *others], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in others:
            task.cancel()
        server.should_exit = True
        await asyncio.gather(serving, *others, return_exceptions=True)
        await bootstrap.close()
        await asyncio.to_thread(engine.close)
        await member.leave()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", default="mixed", choices=get_args(Role))
    sys.exit(run_service("engine", partial(serve, parser.parse_args().role), EngineError))
