"""What a tool is, and what can go wrong in a call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from postroad.messages import ToolStatus


class ToolSettingsError(ValueError):
    """A tool of the recipe can't be served as it is set; the message says why."""


class ToolsLost(RuntimeError):
    """Tools can't be served any more by this process; another one may."""


class CallFailed(Exception):
    """A call that gave no result. `content` is told to the model, except for sandbox_lost."""

    def __init__(self, status: ToolStatus, content: str) -> None:
        super().__init__(f"{status}: {content}")
        self.status, self.content = status, content


@dataclass(frozen=True)
class Tool:
    """`parameters` is the JSON schema of the arguments. `call` takes them and the name of the attempt's session; it raises
    CallFailed. A stateful tool's session can be gone on with by one process alone. With `own_deadline` the tool keeps its
    deadline itself, counted from where its code starts."""

    name: str
    description: str
    parameters: dict[str, Any]
    call: Callable[[dict[str, Any], str], Awaitable[str]]
    deadline_s: float
    concurrency: int
    output_characters: int
    stateful: bool = False
    own_deadline: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """As OpenAI's chat completions take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def cut(text: str, limit: int) -> str:
    """`text`, without its middle where it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
