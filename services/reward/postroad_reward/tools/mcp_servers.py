"""Tools of MCP servers, by the official package (postroad-reward[mcp]): over stdio or streamable HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

from postroad.config.tools import ToolSection
from postroad_reward.tools.base import CallFailed, Tool, ToolSettingsError, ToolsLost

logger = logging.getLogger(__name__)

START_S = 60.0


def check(section: ToolSection) -> None:
    """Raises ToolSettingsError where the package is missing."""
    if find_spec("mcp") is None:
        raise ToolSettingsError("tools of kind mcp need the package mcp: pip install 'postroad-reward[mcp]'")


@contextlib.asynccontextmanager
async def mcp_tools(section: ToolSection, lost: asyncio.Event) -> AsyncIterator[list[Tool]]:
    """The tools of a server, connected to until the end; a stdio server runs as long. `lost` is set when it is gone.
    Raises ToolsLost where it can't be connected to."""
    check(section)
    listed: asyncio.Future[list[Tool]] = asyncio.get_running_loop().create_future()
    keeping = asyncio.create_task(_keep(section, listed, lost))
    try:
        done, _ = await asyncio.wait({listed}, timeout=START_S)
        if not done:
            raise ToolsLost(f"the MCP server {section.url or section.command} says nothing")
        yield listed.result()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _keep(section: ToolSection, listed: asyncio.Future[list[Tool]], lost: asyncio.Event) -> None:
    """The connection's own task, which it has to be opened and closed in. The server's environment has nothing of ours."""
    from mcp import Client, StdioServerParameters

    environment = {name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")}
    where = section.url or StdioServerParameters(command=section.command[0], args=section.command[1:], env=environment)
    try:
        async with Client(where, read_timeout_seconds=START_S) as client:
            found = (await client.list_tools()).tools
            listed.set_result([_tool(section, client, tool, lost) for tool in found])
            await lost.wait()
    except Exception as error:  # whatever the server or the package makes of its end
        logger.warning("the MCP server %s is gone", section.url or section.command, exc_info=error)
        lost.set()
        if not listed.done():
            listed.set_exception(ToolsLost(f"the MCP server {section.url or section.command} can't be used: {error!r}"))


def _tool(section: ToolSection, client: Any, listed: Any, lost: asyncio.Event) -> Tool:
    from mcp import MCPError
    from mcp.types import INVALID_PARAMS

    async def call(arguments: dict[str, Any], session: str) -> str:
        try:
            result = await client.call_tool(listed.name, arguments, read_timeout_seconds=section.deadline_s + START_S)
        except Exception as error:
            if isinstance(error, MCPError) and error.code == INVALID_PARAMS:
                raise CallFailed("invalid_arguments", error.message) from error
            lost.set()
            raise CallFailed("sandbox_lost", f"the MCP server of {listed.name!r} failed: {error!r}"[:500]) from error
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise CallFailed("error", text)
        return text

    return Tool(
        listed.name, listed.description or "", listed.input_schema, call, section.deadline_s, section.concurrency,
        section.output_characters,
    )  # fmt: skip
