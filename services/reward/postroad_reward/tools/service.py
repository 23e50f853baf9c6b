"""The tools of a run, served until it is told to stop. It lives in the reward service's process, beside the gradings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import Counter, Histogram

from postroad.bus import Bus, replies
from postroad.config import Environment, Recipe
from postroad.config.tools import ToolSection
from postroad.messages import Message, SchemaError, ToolCall, ToolList, ToolResult, ToolStatus
from postroad_reward.grading import sandbox_of
from postroad_reward.sandbox import SandboxLost, SandboxUnavailable
from postroad_reward.tools import mcp_servers
from postroad_reward.tools.base import CallFailed, Tool, ToolSettingsError, ToolsLost, cut
from postroad_reward.tools.functions import function_tool
from postroad_reward.tools.python import Cells, python_tool
from postroad_reward.tools.search import search_tool

logger = logging.getLogger(__name__)

ROOM_S = 20.0  # a call waits so long for its turn; then it is to come again
IN_HAND = 4096

CALLS = Counter("postroad_tools_calls", "Calls of tools by name and status", ["tool", "status"])
SECONDS = Histogram("postroad_tools_call_seconds", "Seconds of a call, waiting for its turn included", ["tool"])


class ToolService:
    """`holder` names this process to callers that have to come back to it."""

    def __init__(self, environment: Environment, recipe: Recipe) -> None:
        self.environment, self.recipe = environment, recipe
        self.holder = uuid.uuid4().hex
        pythons = [tool for tool in recipe.tools if tool.kind == "python"]
        self._sandbox = sandbox_of(recipe.reward, sum(tool.concurrency for tool in pythons))
        self._cells = Cells(self._sandbox)
        self._lost = asyncio.Event()
        self.tools: dict[str, Tool] = {}
        self._rooms: dict[str, asyncio.Semaphore] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Raises ToolSettingsError or SandboxUnavailable where a tool can't be served, ToolsLost where it can't any more."""
        bus = await Bus.connect(self.environment.nats_url, self.environment.run)
        try:
            async with self._made():
                subjects = {bus.subjects.tool(): "tools", bus.subjects.tool(self.holder): ""}
                async with replies(bus, subjects, self.handle, IN_HAND):
                    await _first_of(stop, self._lost)
        finally:
            await bus.close()
        if self._lost.is_set() and not stop.is_set():
            raise ToolsLost("an MCP server is gone; this process starts anew")

    @contextlib.asynccontextmanager
    async def _made(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(httpx.AsyncClient())
            stack.push_async_callback(self._sandbox.close)
            stack.push_async_callback(self._cells.close)
            made: list[Tool] = []
            for section in self.recipe.tools:
                if section.kind == "python":
                    await self._sandbox.start()
                    made.append(python_tool(section, self._sandbox, self._cells))
                elif section.kind == "search":
                    made.append(await asyncio.to_thread(search_tool, section, http))
                elif section.kind == "function":
                    made.append(function_tool(section))
                else:
                    made += await stack.enter_async_context(mcp_servers.mcp_tools(section, self._lost))
            self.tools = {tool.name: tool for tool in made}
            if len(self.tools) < len(made):
                raise ToolSettingsError(f"two tools have the same name: {sorted(tool.name for tool in made)}")
            self._rooms = {tool.name: asyncio.Semaphore(tool.concurrency) for tool in made}
            reaping = asyncio.create_task(self._cells.reap())
            try:
                yield
            finally:
                reaping.cancel()
                await asyncio.gather(reaping, return_exceptions=True)

    async def handle(self, message: Message) -> ToolResult | ToolList:
        if not isinstance(message, ToolCall):
            raise SchemaError(f"a {message.kind} is no call of a tool")
        run, identity = message.run, message.id
        if not message.tool:
            await self._cells.end(message.session)
            return ToolList(
                run=run, id=identity, tools=[tool.schema for tool in self.tools.values()],
                deadlines_s={name: tool.deadline_s + 2 * ROOM_S for name, tool in self.tools.items()},
            )  # fmt: skip
        started, holder, label = time.monotonic(), "", message.tool if message.tool in self.tools else "unknown"
        try:
            tool, arguments = self._understood(message)
            holder = self.holder if tool.stateful else ""
            content, status = await self._call(tool, arguments, message.session), "ok"
        except CallFailed as failure:
            content, status = failure.content, failure.status
        if label != "unknown":
            content = cut(content, self.tools[label].output_characters)
        CALLS.labels(label, status).inc()
        SECONDS.labels(label).observe(time.monotonic() - started)
        return ToolResult(run=run, id=identity, status=status, content=content, holder=holder)

    def _understood(self, call: ToolCall) -> tuple[Tool, dict[str, Any]]:
        tool = self.tools.get(call.tool)
        if tool is None:
            raise CallFailed(
                "unknown_tool", f"there is no tool {call.tool!r}; there are {', '.join(sorted(self.tools))}"
            )
        if tool.stateful and call.holder and not self._cells.knows(call.session):
            raise CallFailed("sandbox_lost", f"the session {call.session} is not open any more")
        try:
            arguments = json.loads(call.arguments or "{}") if isinstance(call.arguments, str) else call.arguments
        except ValueError as error:
            raise CallFailed("invalid_arguments", f"the arguments are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise CallFailed("invalid_arguments", f"the arguments must be a JSON object, not {arguments!r}"[:300])
        return tool, arguments

    async def _call(self, tool: Tool, arguments: dict[str, Any], session: str) -> str:
        room = self._rooms[tool.name]
        try:
            async with asyncio.timeout(ROOM_S):
                await room.acquire()
        except TimeoutError as error:
            raise CallFailed(
                "sandbox_lost", f"{tool.name} had no room within {ROOM_S:g} s: raise its concurrency"
            ) from error
        try:
            async with asyncio.timeout(tool.deadline_s + (ROOM_S if tool.own_deadline else 0.0)):
                return await tool.call(arguments, session)
        except TimeoutError as error:
            status: ToolStatus = "sandbox_lost" if tool.own_deadline else "timeout"
            raise CallFailed(status, f"no result within {tool.deadline_s:g} s") from error
        except (SandboxLost, SandboxUnavailable) as error:
            raise CallFailed("sandbox_lost", str(error)) from error
        except CallFailed:
            raise
        except Exception as error:  # a tool of the user's may raise anything: the model is told, the log too
            logger.warning("the tool %s raised", tool.name, exc_info=error)
            raise CallFailed("error", f"{type(error).__name__}: {error}") from error
        finally:
            room.release()


def check_tools(sections: Sequence[ToolSection]) -> None:
    """Raises ToolSettingsError for what can't be served, as far as that can be told without starting it."""
    for section in sections:
        if section.kind == "function":
            function_tool(section)
        elif section.kind == "mcp":
            mcp_servers.check(section)
        elif section.corpus is not None and not Path(section.corpus).is_file():
            raise ToolSettingsError(f"tool {section.called!r}: there is no corpus {section.corpus}")


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
