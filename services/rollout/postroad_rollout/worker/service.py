"""The life of a worker: start → ready → drain → stop. Between them, one hop: tasks in, trajectories out."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Literal

from redis.exceptions import RedisError

from postroad.bus import Bus, Hop, work_and_drain
from postroad.config import Environment, Recipe
from postroad.store import Store, StoreError
from postroad.telemetry.health import HealthServer
from postroad_rollout.worker.group import GroupRunner
from postroad_rollout.worker.model_client import Connection
from postroad_rollout.worker.routers import Routers

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
DRAIN_S = 3.0
LEAVE_S = 1.0
ACK_WAIT_S = 10.0  # after so long without a heartbeat a task is another worker's

State = Literal["start", "ready", "drain", "stop"]


class WorkerService:
    """Works until `stop` is set, then finishes what it has in hand within DRAIN_S; the rest is delivered again."""

    def __init__(self, environment: Environment, recipe: Recipe, *, ack_wait_s: float = ACK_WAIT_S) -> None:
        self.environment, self.rollout = environment, recipe.rollout
        self.ack_wait_s = ack_wait_s
        self.name = environment.name or f"worker-{os.getpid()}"
        self.state: State = "start"
        self.runner: GroupRunner | None = None

    async def run(self, stop: asyncio.Event) -> None:
        environment = self.environment
        health = HealthServer(environment.host, environment.port, lambda: self.state == "ready")
        bus = await Bus.connect(environment.nats_url, environment.run)
        store = await Store.connect(environment.redis_url, environment.run)
        connection = Connection(Routers(store), environment.key)
        await connection.open()
        self.runner = GroupRunner(bus, connection)
        beat = asyncio.create_task(self._heartbeat(store, health.port))
        try:
            self.state = "ready"
            await self._work(bus, self.runner, stop)
        finally:
            self.state = "stop"
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
            await connection.close()
            await self._leave(store)
            await store.close()
            await bus.close()
            health.close()

    async def _work(self, bus: Bus, runner: GroupRunner, stop: asyncio.Event) -> None:
        hop = Hop(
            "TASKS", "worker", "task", runner.handle, self.rollout.groups_per_worker, self.ack_wait_s,
            self.rollout.deliveries,
        )  # fmt: skip

        def drain() -> None:
            self.state = "drain"

        await work_and_drain(bus, hop, stop, drain_s=DRAIN_S, on_drain=drain)

    async def _leave(self, store: Store) -> None:
        try:
            async with asyncio.timeout(LEAVE_S):
                await store.leave("worker", self.name)
        except (RedisError, StoreError, OSError, TimeoutError) as error:
            logger.warning("this worker stays registered for up to %.0f s: %r", 3 * HEARTBEAT_S, error)

    async def _heartbeat(self, store: Store, port: int) -> None:
        while self.state != "stop":  # a cancellation that meets redis-py's wait_for is lost on Python 3.11
            groups = len(self.runner.groups) if self.runner else 0
            info = {"pid": os.getpid(), "port": port, "groups": groups, "state": self.state}
            try:
                await store.register("worker", self.name, info, 3 * HEARTBEAT_S)
            except (RedisError, StoreError, OSError) as error:
                logger.warning("this worker could not register: %r", error)
            await asyncio.sleep(HEARTBEAT_S)
