"""What every engine of the mesh does beside serving: it is registered, takes new weights, and hands them on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

from postroad.bus import Bus
from postroad.config import Environment, Recipe
from postroad.store import Store
from postroad.weights import Puller
from postroad_rollout.updates import Served, Updater

HEARTBEAT_S = 1.0
TTL_S = 5.0


class Membership:
    """One engine's place in the mesh. It is ready once it serves the newest published version."""

    def __init__(self, environment: Environment, recipe: Recipe, engine: Served) -> None:
        self.name = environment.name or f"engine-{os.getpid()}"
        self._environment, self._recipe, self._engine = environment, recipe, engine

    async def join(self) -> None:
        environment = self._environment
        self._bus = await Bus.connect(environment.nats_url, environment.run)
        self._store = await Store.connect(environment.redis_url, environment.run)
        self._puller = Puller(self._store, environment.key, name=self.name)
        await self._puller.serve(environment.host, environment.advertise)
        mode = self._recipe.rollout.engine.update
        self._updater = Updater(self._engine, self._bus, self._puller, name=self.name, mode=mode)

    def ready(self) -> bool:
        return self._updater.current.is_set()

    async def run(self, port: int, describe: Callable[[], dict[str, Any]]) -> None:
        """Until cancelled. `describe` gives what the registration says beside address, version and state."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._updater.run())
            group.create_task(self._beat(port, describe))

    async def _beat(self, port: int, describe: Callable[[], dict[str, Any]]) -> None:
        url = f"http://{self._environment.advertise or self._environment.host}:{port}"
        while True:
            info = {
                "url": url, "pid": os.getpid(), "port": port, "version": self._engine.version,
                "digest": self._engine.digest, "state": "ready" if self.ready() else "pulling",
                "slots": self._recipe.rollout.engine.slots, **self._puller.info(), **describe(),
            }  # fmt: skip
            await self._store.register("engine", self.name, info, TTL_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._updater.switched.wait(), HEARTBEAT_S)
                self._updater.switched.clear()

    async def leave(self) -> None:
        await self._store.leave("engine", self.name)
        await self._puller.close()
        await self._store.close()
        await self._bus.close()
