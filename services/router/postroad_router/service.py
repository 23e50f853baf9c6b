"""The life of a router: start → ready → drain → stop. It keeps no state that another router could not rebuild."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from redis.exceptions import RedisError

from postroad.config import Environment, Recipe, RecipeError
from postroad.store import Store, StoreError
from postroad_router.api import create_app
from postroad_router.engine_client import EngineClient
from postroad_router.engines import Engines
from postroad_router.parts import build_parts

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
DRAIN_S = 3
LEAVE_S = 1.0
KEEP_ALIVE_S = 30
GARBAGE = 20_000  # objects between two collections


class _Server(uvicorn.Server):
    """uvicorn with its signal handlers left out: the service has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RouterService:
    """Serves until `stop` is set, then gives running requests DRAIN_S to end."""

    def __init__(self, environment: Environment, recipe: Recipe) -> None:
        self.environment, self.recipe = environment, recipe
        self.name = environment.name or f"router-{os.getpid()}"
        self.url = ""

    async def run(self, stop: asyncio.Event) -> None:
        environment = self.environment
        listening = socket.create_server(
            (environment.host, environment.port),
            backlog=2048,
            reuse_port=True,  # replicas share a port
        )
        tls = self.recipe.router
        scheme, host = "https" if tls.tls_certificate else "http", environment.advertise or environment.host
        self.url = f"{scheme}://{host}:{listening.getsockname()[1]}"
        store = await Store.connect(environment.redis_url, environment.run)
        client = EngineClient(environment.key)
        engines = Engines(store, client)
        try:
            parts = build_parts(environment, self.recipe, engines)
            config = uvicorn.Config(
                create_app(parts), log_config=None, access_log=False, lifespan="off", ws="none",
                timeout_graceful_shutdown=DRAIN_S, timeout_keep_alive=KEEP_ALIVE_S, server_header=False, proxy_headers=False,
                ssl_certfile=tls.tls_certificate, ssl_keyfile=tls.tls_key,
            )  # fmt: skip
            try:
                config.load()
            except (OSError, ssl.SSLError) as error:
                raise RecipeError(f"router.tls_certificate and router.tls_key can't be used: {error}") from error
            server = _Server(config)
            gc.collect()
            gc.freeze()  # what is there now stays: no collection needs to look at it while tokens wait
            gc.set_threshold(GARBAGE)
            async with asyncio.TaskGroup() as group:
                polling, beat = group.create_task(engines.run()), group.create_task(self._heartbeat(store, stop))
                serving = group.create_task(server.serve(sockets=[listening]))
                stopping = asyncio.ensure_future(stop.wait())
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
                parts.draining = server.should_exit = True
                stop.set()
                beat.cancel()
                await asyncio.wait({beat})  # it must not register again
                await self._leave(store)
                await serving
                engines.close()
                for task in (polling, stopping):
                    task.cancel()
        finally:
            listening.close()
            await client.close()
            await store.close()

    async def _leave(self, store: Store) -> None:
        try:
            async with asyncio.timeout(LEAVE_S):
                await store.leave("router", self.name)
        except (RedisError, StoreError, OSError, TimeoutError) as error:
            logger.warning("this router stays registered for up to %.0f s: %r", 3 * HEARTBEAT_S, error)

    async def _heartbeat(self, store: Store, stop: asyncio.Event) -> None:
        info = {"url": self.url, "pid": os.getpid(), "port": int(self.url.rpartition(":")[2])}
        while not stop.is_set():  # a cancellation that meets redis-py's wait_for is lost on Python 3.11
            try:
                await store.register("router", self.name, info, 3 * HEARTBEAT_S)
            except (RedisError, StoreError, OSError) as error:
                logger.warning("this router could not register: %r", error)
            await asyncio.sleep(HEARTBEAT_S)
