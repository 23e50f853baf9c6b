"""Functions that the tests serve as tools, and an MCP server: `python example_tools.py`."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated, Literal

from pydantic import Field


def add(a: int, b: Annotated[int, Field(description="The second one.")] = 1) -> int:
    """The sum of two numbers."""
    return a + b


async def shout(text: str, how: Literal["loud", "louder"] = "loud") -> dict[str, str]:
    """Says it loudly."""
    return {how: text.upper()}


def slow(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def raises() -> None:
    raise LookupError("no such thing")


def unnamed(*values: int) -> int:
    return sum(values)


if __name__ == "__main__":
    from mcp.server import MCPServer

    server = MCPServer("example")

    @server.tool()
    def multiply(a: int, b: int) -> int:
        """The product."""
        return a * b

    @server.tool()
    def leave() -> str:
        """Ends the server."""
        os._exit(1)

    @server.tool()
    def secret() -> str:
        """What it knows of postroad."""
        return str(sorted(name for name in os.environ if name.startswith("POSTROAD_")))

    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
