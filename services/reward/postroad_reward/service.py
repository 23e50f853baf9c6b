"""The life of a reward service: start → ready → drain → stop. Between them, one hop: trajectories in, samples out."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Literal

from prometheus_client import Counter, Histogram

from postroad.bus import AlreadyPublished, Bus, Hop, Reject, RetryLater, work_and_drain
from postroad.config import Environment, Recipe
from postroad.messages import Message, Sample, Trajectory
from postroad.store import Store
from postroad.telemetry.health import HealthServer
from postroad_reward.errors import GraderFailed, GraderTimeout, InvalidReward
from postroad_reward.graders import Attempt, Grade
from postroad_reward.pool import Pool

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
DRAIN_S = 4.0

GRADINGS = Counter("postroad_reward_gradings", "Gradings by grader and outcome", ["grader", "outcome"])
SECONDS = Histogram("postroad_reward_grading_seconds", "Seconds of a grading, waiting for a process included")
PROCESSES = Counter("postroad_reward_killed_processes", "Graders' processes that ran past their deadline")

State = Literal["start", "ready", "drain", "stop"]


class RewardService:
    """Grades until `stop` is set, then finishes what it has in hand within DRAIN_S; the rest is delivered again."""

    def __init__(self, environment: Environment, recipe: Recipe) -> None:
        self.environment, self.recipe = environment, recipe
        self.name = environment.name or f"reward-{os.getpid()}"
        self.state: State = "start"
        reward = recipe.reward
        self.pool = Pool(limit=reward.concurrency, prepare=(reward.grader, dict(reward.settings)))
        self.hop = Hop(
            "TRAJECTORIES", "reward", "trajectory", self.handle, reward.concurrency, deliveries=reward.deliveries
        )

    async def run(self, stop: asyncio.Event) -> None:
        environment = self.environment
        health = HealthServer(environment.host, environment.port, lambda: self.state == "ready")
        self.bus = await Bus.connect(environment.nats_url, environment.run)
        self.store = await Store.connect(environment.redis_url, environment.run)
        beat = asyncio.create_task(self._heartbeat(health.port))
        try:
            await self.pool.start()
            self.state = "ready"
            await self._work(stop)
        finally:
            self.state = "stop"
            beat.cancel()
            await self.pool.close()
            await self.store.leave("reward", self.name)
            await self.store.close()
            await self.bus.close()
            health.close()

    async def _work(self, stop: asyncio.Event) -> None:
        def drain() -> None:
            self.state = "drain"

        await work_and_drain(self.bus, self.hop, stop, drain_s=DRAIN_S, on_drain=drain)

    async def handle(self, message: Message) -> None:
        """Grade one trajectory and publish its sample. What stands in the log already is not graded again."""
        if not isinstance(message, Trajectory):
            raise Reject("invalid_message", f"TRAJECTORIES holds a {message.kind}, not a trajectory")
        subject = self.bus.subjects.sample(message.group, message.member)
        if await self.bus.last("SAMPLES", subject) is not None:
            return
        started = time.monotonic()
        grade = await self._grade(message)
        seconds = time.monotonic() - started
        SECONDS.observe(seconds)
        sample = Sample(
            run=message.run, id=message.id, trajectory=message, reward=grade.reward, metrics=grade.metrics,
            seconds=seconds,
        )  # fmt: skip
        try:
            await self.bus.publish(subject, sample, once=True)
        except AlreadyPublished:
            logger.info("%s was graded already", message.id)

    async def _grade(self, trajectory: Trajectory) -> Grade:
        """The grade, or the failure as what is to become of the message."""
        spec = trajectory.task.reward
        attempt = Attempt(trajectory.task.prompt, trajectory.response, spec.label, spec.metadata)
        outcome = "cancelled"
        try:
            grade = await self.pool.grade(spec.grader, spec.settings, attempt, self.recipe.reward.deadline_s)
            outcome = "graded"
            return grade
        except GraderTimeout as error:
            outcome = "timeout"
            PROCESSES.inc()
            raise RetryLater("timeout", str(error)) from error
        except GraderFailed as error:
            outcome = "settings" if error.settings else "failed"
            if error.settings:
                raise Reject("grader_failed", str(error)) from error
            raise RetryLater("grader_failed", str(error)) from error
        except InvalidReward as error:
            outcome = "failed"
            raise RetryLater("grader_failed", str(error)) from error
        finally:
            GRADINGS.labels(spec.grader, outcome).inc()

    async def _heartbeat(self, port: int) -> None:
        while True:
            info = {"pid": os.getpid(), "port": port, "state": self.state}
            await self.store.register("reward", self.name, info, 3 * HEARTBEAT_S)
            await asyncio.sleep(HEARTBEAT_S)
