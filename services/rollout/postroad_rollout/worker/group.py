"""One task: its missing members at the same time, each published as it ends."""

from __future__ import annotations

import asyncio
import logging
import time

from postroad.bus import AlreadyPublished, Bus, Reject, RetryLater
from postroad.messages import Message, Task, Trajectory
from postroad.messages.trajectory import trajectory_id
from postroad.telemetry.tracing import span
from postroad_rollout.worker.agents import Agent, Attempt, make_agent
from postroad_rollout.worker.errors import AgentSettingsError, DeadlinePassed, PeerFailed, RefusedByEngine, ToolLost
from postroad_rollout.worker.metrics import GROUPS, MEMBERS, SECONDS, TOKENS
from postroad_rollout.worker.model_client import Connection, ModelClient
from postroad_rollout.worker.peers import Peers

logger = logging.getLogger(__name__)


class AgentFailed(Exception):
    """A user's agent raised, or returned what is no attempt."""


class GroupRunner:
    """`groups` are those in hand."""

    def __init__(self, bus: Bus, connection: Connection) -> None:
        self._bus, self._connection = bus, connection
        self.groups: set[str] = set()

    async def handle(self, message: Message) -> None:
        """Returns when every member's trajectory is in the log. Raises Reject or RetryLater where that failed; what
        was published stays, and a redelivery makes only what is missing."""
        if not isinstance(message, Task):
            raise Reject("invalid_message", f"TASKS holds a {message.kind}, not a task")
        if (late_s := time.time() - message.deadline) >= 0:
            raise Reject("deadline", f"the deadline passed {late_s:.1f} s before the task was begun")
        try:
            agent = make_agent(message.agent)
        except AgentSettingsError as error:
            raise Reject("invalid_message", str(error)) from error
        missing = await self._missing(message)
        self.groups.add(message.group)
        GROUPS.set(len(self.groups))
        try:
            peers = Peers(self._bus, message, missing)
            runs = [
                self._member(agent, ModelClient(self._connection, self._bus, message, member, peers))
                for member in missing
            ]
            outcomes = await asyncio.gather(*runs, return_exceptions=True)
        finally:
            self.groups.discard(message.group)
            GROUPS.set(len(self.groups))
        _raise_worst(message, [outcome for outcome in outcomes if isinstance(outcome, BaseException)])

    async def _missing(self, task: Task) -> list[int]:
        """Members without a trajectory in the log: all of them at the first delivery."""
        first = self._bus.subjects.trajectory(task.group, 0)
        known = await self._bus.subjects_of("TRAJECTORIES", first.removesuffix("0") + "*")
        missing = [m for m in range(task.members) if self._bus.subjects.trajectory(task.group, m) not in known]
        if len(missing) < task.members:
            MEMBERS.labels("found").inc(task.members - len(missing))
            logger.info("group %s: %d of %d members are in the log", task.group, len(known), task.members)
        return missing

    async def _member(self, agent: Agent, model: ModelClient) -> None:
        task, member, published = model.task, model.member, False
        started = time.monotonic()
        with span("member", group=task.group, member=member):
            try:
                attempt = await self._attempt(task, model, agent)
                seconds = time.monotonic() - started
                trajectory = _trajectory(task, model, attempt, seconds)
                await self._bus.publish(self._bus.subjects.trajectory(task.group, member), trajectory, once=True)
                published = True
            except AlreadyPublished:
                published = True
                MEMBERS.labels("already_published").inc()
                return
            finally:
                model.peers.ended(member, published)
                await model.forget()
        MEMBERS.labels("published").inc()
        TOKENS.inc(int(trajectory.loss_mask.sum()))
        SECONDS.observe(seconds)

    async def _attempt(self, task: Task, model: ModelClient, agent: Agent) -> Attempt:
        limit = asyncio.timeout(task.deadline - time.time())
        try:
            async with limit:
                return await agent.run(task, model)
        except RefusedByEngine:
            MEMBERS.labels("refused").inc()
            raise
        except (ToolLost, PeerFailed) as error:
            MEMBERS.labels("tool_lost" if isinstance(error, ToolLost) else "peer_failed").inc()
            raise
        except Exception as error:
            if limit.expired() or isinstance(error, DeadlinePassed):
                MEMBERS.labels("deadline").inc()
                raise DeadlinePassed(f"member {model.member} after {model.retries} retries") from error
            MEMBERS.labels("agent_failed").inc()
            logger.exception("the agent of %s failed", trajectory_id(task.group, model.member))
            raise AgentFailed(repr(error)) from error


def _trajectory(task: Task, model: ModelClient, attempt: Attempt, seconds: float) -> Trajectory:
    try:
        return Trajectory(
            run=task.run, id=trajectory_id(task.group, model.member), member=model.member, task=task,
            tokens=attempt.tokens, loss_mask=attempt.loss_mask, log_probabilities=attempt.log_probabilities,
            versions=attempt.versions, routed_experts=attempt.routed_experts, messages=attempt.messages,
            finish_reason=attempt.finish_reason, engine=attempt.engine, seconds=seconds,
            metrics={**attempt.metrics, "retries": float(model.retries)},
        )  # fmt: skip
    except (ValueError, AttributeError) as error:
        raise AgentFailed(f"the agent's attempt is no trajectory: {error}") from error


def _raise_worst(task: Task, failures: list[BaseException]) -> None:
    """What the members' failures mean for the task: a refusal is for good, then the deadline, then another try."""
    for failure in failures:
        if isinstance(failure, RefusedByEngine):
            raise Reject("refused_by_engine", str(failure)) from failure
    for failure in failures:
        if isinstance(failure, DeadlinePassed):
            late = sum(isinstance(other, DeadlinePassed) for other in failures)
            raise Reject("deadline", f"{late} of {task.members} members were not done: {failure}") from failure
    for failure in sorted(failures, key=lambda failure: isinstance(failure, PeerFailed)):  # a consequence of others
        if isinstance(failure, ToolLost):
            raise RetryLater("sandbox_lost", str(failure)) from failure
        if isinstance(failure, AgentFailed | PeerFailed):
            raise RetryLater("invalid_answer", str(failure)) from failure
        raise failure
