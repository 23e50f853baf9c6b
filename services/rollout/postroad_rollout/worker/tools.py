"""The run's tools as one attempt sees them: NATS requests to whichever process serves them."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from typing import Any

from nats.errors import Error as NatsError

from postroad.bus import Bus, BusError, NobodyListens, ask
from postroad.messages import Message, Task, ToolCall, ToolList, ToolResult, encode
from postroad_rollout.worker.errors import ToolLost
from postroad_rollout.worker.metrics import TOOL_CALLS

logger = logging.getLogger(__name__)

ASK_S = 10.0
ATTEMPTS = 5
BACKOFF_S = 0.2
BACKOFF_MAX_S = 2.0


class Tools:
    """A stateful tool keeps what it knows for as long as the attempt lasts, in one process: where that is lost, so is the
    attempt. Other calls are made again, so a function with effects may see one twice."""

    def __init__(self, bus: Bus, task: Task, session: str) -> None:
        self._bus, self._task, self._session = bus, task, session
        self._list: ToolList | None = None
        self._holders: dict[str, str] = {}

    async def schemas(self, names: list[str] | None = None) -> list[dict[str, Any]]:
        """The tools (those of these names) as chat completions take them."""
        listed = await self._listed()
        return [tool for tool in listed.tools if names is None or tool["function"]["name"] in names]

    async def call(self, name: str, arguments: dict[str, Any] | str) -> ToolResult:
        """The result, of whatever status but sandbox_lost. Raises ToolLost."""
        deadline_s = (await self._listed()).deadlines_s.get(name, 0.0) + ASK_S
        result = await self._ask(name, arguments, deadline_s)
        assert isinstance(result, ToolResult)
        if result.holder:
            self._holders[name] = result.holder
        TOOL_CALLS.labels(result.status).inc()
        return result

    async def close(self) -> None:
        """Tell the processes that hold state that it is not needed any more."""
        for holder in set(self._holders.values()):
            try:
                await self._bus.announce(self._bus.subjects.tool(holder), encode(self._call("", "")))
            except NatsError as error:
                logger.info("%s keeps a session for a while: %r", holder, error)

    async def _listed(self) -> ToolList:
        if self._list is None:
            found = await self._ask("", "", ASK_S)
            assert isinstance(found, ToolList)
            self._list = found
        return self._list

    async def _ask(self, name: str, arguments: dict[str, Any] | str, deadline_s: float) -> Message:
        """While nobody serves tools this waits for somebody; the group runner ends it at the task's deadline."""
        holder, attempt, problem = self._holders.get(name, ""), 0, ""
        while attempt < ATTEMPTS:
            try:
                reply = await ask(self._bus, self._bus.subjects.tool(holder), self._call(name, arguments), deadline_s)
                if isinstance(reply, ToolList if not name else ToolResult):
                    if not isinstance(reply, ToolResult) or reply.status != "sandbox_lost":
                        return reply
                    problem = reply.content
                attempt += 1
            except NobodyListens as error:
                problem = str(error)
            except BusError as error:
                problem, attempt = str(error), attempt + 1
            if holder:
                break
            TOOL_CALLS.labels("asked_again").inc()
            logger.info("%s of %s is asked again: %s", name or "the list of tools", self._task.group, problem)
            await asyncio.sleep(min(BACKOFF_S * 2**attempt, BACKOFF_MAX_S) * random.uniform(0.5, 1.5))
        TOOL_CALLS.labels("sandbox_lost").inc()
        raise ToolLost(f"{name}: {problem}")

    def _call(self, name: str, arguments: dict[str, Any] | str) -> ToolCall:
        return ToolCall(
            run=self._task.run, id=uuid.uuid4().hex, tool=name, arguments=arguments, session=self._session,
            holder=self._holders.get(name, ""),
        )  # fmt: skip
