"""The registry of engines, read again and again into the pool; and the probes of those in quarantine."""

from __future__ import annotations

import asyncio
import logging
import time

from redis.exceptions import RedisError

from postroad.store import Store, StoreError
from postroad_router.engine_client import EngineClient
from postroad_router.pool import Engine, Pool
from postroad_router.routing import Route, Routing, Wanted

logger = logging.getLogger(__name__)

POLL_S = 1.0
POLL_WAITING_S = 0.1  # while a request waits for an engine
READ_S = 5.0
ROLES = ("mixed", "prefill", "decode")


class Engines:
    """`run` keeps `pool` current. While the store can't be read the engines known last are used on."""

    def __init__(self, store: Store, client: EngineClient) -> None:
        self.store, self.client, self.pool, self.routing = store, client, Pool(), Routing()
        self.read = False
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._waiting = 0
        self._closed = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as probes:
            while not self._closed:
                await self._poll()
                for engine in self.pool.due_probes(time.monotonic()):
                    engine.quarantined_until = float("inf")  # until the probe's answer
                    probes.create_task(self._probe(engine))
                if self._waiting:
                    await asyncio.sleep(POLL_WAITING_S)
                    continue
                self._wanted.clear()
                try:
                    async with asyncio.timeout(POLL_S):
                        await self._wanted.wait()
                except TimeoutError:
                    continue

    def close(self) -> None:
        """End `run`. Beside cancelling it: a cancellation that meets redis-py's wait_for is lost on Python 3.11."""
        self._closed = True
        self._wanted.set()

    async def choose(self, wanted: Wanted, deadline_s: float) -> Route | None:
        """The route to use, waited for until `deadline_s` (of time.monotonic); None where there is none by then, or
        where there never will be one."""
        route = self._choose(wanted)
        if route is not None:
            return route
        self._waiting += 1
        self._wanted.set()
        try:
            while (left_s := deadline_s - time.monotonic()) > 0 and not wanted.gone(self.pool.engines.values()):
                self._changed.clear()
                try:
                    async with asyncio.timeout(left_s):
                        await self._changed.wait()
                except TimeoutError:
                    break
                route = self._choose(wanted)
                if route is not None:
                    return route
            return self._choose(wanted)
        finally:
            self._waiting -= 1

    def _choose(self, wanted: Wanted) -> Route | None:
        return self.routing.choose(self.pool.engines.values(), wanted)

    def fail(self, engine: Engine) -> None:
        self.pool.fail(engine, time.monotonic())
        self._wanted.set()

    async def _poll(self) -> None:
        try:
            async with asyncio.timeout(READ_S):
                members = await self.store.members("engine")
        except (RedisError, StoreError, OSError, TimeoutError) as error:
            logger.warning("the registry of engines can't be read, the known ones are used on: %r", error)
            return
        self.read = True
        valid = {name: info for name, info in members.items() if _is_engine(info)}
        for name in members.keys() - valid.keys():
            logger.warning("the registration of engine %s is not valid: %s", name, members[name])
        if self.pool.update(valid):
            self._changed.set()

    async def _probe(self, engine: Engine) -> None:
        healthy = await self.client.healthy(engine.url)
        self.pool.probed(engine, healthy, time.monotonic())
        logger.info("probe of %s: %s", engine.name, "healthy, admitted" if healthy else "not healthy")
        if healthy:
            self._changed.set()


def _is_engine(info: object) -> bool:
    if not isinstance(info, dict) or not isinstance(info.get("url"), str):
        return False
    numbers = all(type(info.get(key, 0)) is int for key in ("pid", "version", "slots", "running"))
    role, port = info.get("role", "mixed"), info.get("bootstrap_port")
    return numbers and role in ROLES and (type(port) is int if role == "prefill" else True)
