"""Rollout worker to tool service and back, by NATS request and reply: not logged, each with a deadline."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from postroad.messages.base import Message

ToolStatus = Literal["ok", "error", "timeout", "sandbox_lost", "unknown_tool", "invalid_arguments"]
"""All but `sandbox_lost` are told to the model; that one is a failure of ours, and the attempt begins anew."""


class ToolCall(Message):
    """`arguments` are an object, or its JSON text as the model wrote it. A stateful tool keeps what it knows by `session`,
    the attempt's, and is called at its `holder` after the first time. Without `tool` the call asks what tools there are,
    and ends the session."""

    kind: ClassVar[str] = "tool_call"

    tool: str = ""
    arguments: dict[str, Any] | str = ""
    session: str = ""
    holder: str = ""


class ToolResult(Message):
    """`holder` is the one process that can go on with the session; "" where any can."""

    kind: ClassVar[str] = "tool_result"

    status: ToolStatus
    content: str
    holder: str = ""


class ToolList(Message):
    """What can be called, as OpenAI's chat completions take it, and by name how long a call may take."""

    kind: ClassVar[str] = "tool_list"

    tools: list[dict[str, Any]]
    deadlines_s: dict[str, float]
