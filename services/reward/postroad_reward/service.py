"""The life of a reward service: start → ready → drain → stop. Between them, one hop: trajectories in, samples out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Literal

from prometheus_client import Counter, Histogram

from postroad.bus import AlreadyPublished, Bus, Hop, Reject, RetryLater, work_and_drain
from postroad.config import Environment, Recipe
from postroad.messages import DeadReason, Message, Sample, Trajectory
from postroad.store import Store
from postroad.telemetry.health import HealthServer
from postroad_reward.errors import GraderFailed, GraderTimeout, InvalidAnswer, InvalidReward, JudgeUnavailable
from postroad_reward.graders import Attempt, Grade
from postroad_reward.grading import Grading, checked
from postroad_reward.sandbox import SandboxLost

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
DRAIN_S = 3.0
GROUPED = 4096  # trajectories in hand where a grader waits for whole groups
GROUP_POLL_S, GROUP_SLACK_S = 0.2, 5.0

GRADINGS = Counter("postroad_reward_gradings", "Gradings by grader and outcome", ["grader", "outcome"])
SECONDS = Histogram("postroad_reward_grading_seconds", "Seconds of a grading, waiting for a process included")

REASONS: dict[type[Exception], DeadReason] = {
    GraderTimeout: "timeout", SandboxLost: "sandbox_lost", JudgeUnavailable: "judge_unavailable",
    InvalidAnswer: "invalid_answer", GraderFailed: "grader_failed", InvalidReward: "grader_failed",
}  # fmt: skip

State = Literal["start", "ready", "drain", "stop"]


class RewardService:
    """Grades until `stop` is set, then finishes what it has in hand within DRAIN_S; the rest is delivered again."""

    def __init__(self, environment: Environment, recipe: Recipe) -> None:
        self.environment, self.recipe = environment, recipe
        self.name = environment.name or f"reward-{os.getpid()}"
        self.state: State = "start"
        reward = recipe.reward
        self.grading = Grading(reward)
        grader, settings = checked(reward.grader, dict(reward.settings))
        room = GROUPED if grader.group(settings) else reward.concurrency
        self._room = asyncio.Semaphore(reward.concurrency)
        self.hop = Hop("TRAJECTORIES", "reward", "trajectory", self.handle, room, deliveries=reward.deliveries)

    async def run(self, stop: asyncio.Event) -> None:
        environment = self.environment
        health = HealthServer(environment.host, environment.port, lambda: self.state == "ready")
        self.bus = await Bus.connect(environment.nats_url, environment.run)
        self.store = await Store.connect(environment.redis_url, environment.run)
        beat = asyncio.create_task(self._heartbeat(health.port))
        try:
            await self.grading.start()
            self.state = "ready"
            await self._work(stop)
        finally:
            self.state = "stop"
            beat.cancel()
            await self.grading.close()
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
        spec, members = message.task.reward, [message]
        if await self._graded(message):
            return
        with _failures_of(message):
            grader, settings = checked(spec.grader, spec.settings)
        if grader.group(settings):
            if self.hop.concurrency < GROUPED:
                raise Reject("grader_failed", f"{spec.grader} grades whole groups: the recipe must name it itself")
            members = await self._members(message)
            if not members:
                return
        async with self._room:
            started = time.monotonic()
            with _failures_of(message):
                attempts = [attempt_of(member) for member in members]
                grades = await self.grading.grade(spec.grader, spec.settings, attempts)
            seconds = time.monotonic() - started
        SECONDS.observe(seconds)
        GRADINGS.labels(spec.grader, "graded").inc(len(members))
        for member, grade in zip(members, grades, strict=True):
            await self._publish(member, grade, seconds)

    async def _publish(self, trajectory: Trajectory, grade: Grade, seconds: float) -> None:
        sample = Sample(
            run=trajectory.run, id=trajectory.id, trajectory=trajectory, reward=grade.reward, metrics=grade.metrics,
            seconds=seconds,
        )  # fmt: skip
        try:
            await self.bus.publish(self.bus.subjects.sample(trajectory.group, trajectory.member), sample, once=True)
        except AlreadyPublished:
            logger.info("%s was graded already", trajectory.id)

    async def _graded(self, trajectory: Trajectory) -> bool:
        subject = self.bus.subjects.sample(trajectory.group, trajectory.member)
        return await self.bus.last("SAMPLES", subject) is not None

    async def _members(self, trajectory: Trajectory) -> list[Trajectory]:
        """All members of the group when they are there, for its first member, which grades them; nothing for the others,
        as soon as the first has published their sample. A group whose members do not all come by its deadline is dead."""
        task = trajectory.task
        end = task.deadline + (self.recipe.reward.deadline_s + GROUP_SLACK_S) * self.recipe.reward.deliveries
        subjects = [self.bus.subjects.trajectory(task.group, member) for member in range(task.members)]
        while time.time() < end:
            if trajectory.member > 0:
                if await self._graded(trajectory):
                    return []
            else:
                found = [await self.bus.last("TRAJECTORIES", subject) for subject in subjects]
                members = [entry.message for entry in found if entry is not None]
                if len(members) == task.members:
                    return [member for member in members if isinstance(member, Trajectory)]
                if time.time() > task.deadline + GROUP_SLACK_S:
                    break
            await asyncio.sleep(GROUP_POLL_S)
        raise Reject(
            "deadline", f"{trajectory.id}: its group of {task.members} was not complete, or not graded, in time"
        )

    async def _heartbeat(self, port: int) -> None:
        while True:
            info = {"pid": os.getpid(), "port": port, "state": self.state}
            await self.store.register("reward", self.name, info, 3 * HEARTBEAT_S)
            await asyncio.sleep(HEARTBEAT_S)


def attempt_of(trajectory: Trajectory) -> Attempt:
    spec = trajectory.task.reward
    tokens = int(trajectory.loss_mask.sum())
    return Attempt(trajectory.task.prompt, trajectory.response, spec.label, spec.metadata, tokens)


@contextlib.contextmanager
def _failures_of(trajectory: Trajectory) -> Iterator[None]:
    """A failure as what is to become of the message, with the sample's id; the grader's traceback is its cause."""
    try:
        yield
    except tuple(REASONS) as error:
        reason = next(reason for kind, reason in REASONS.items() if isinstance(error, kind))
        GRADINGS.labels(trajectory.task.reward.grader, reason).inc()
        if isinstance(error, GraderFailed) and error.settings:
            raise Reject(reason, f"{trajectory.id}: {error}") from error
        raise RetryLater(reason, f"{trajectory.id}: {error}") from error
