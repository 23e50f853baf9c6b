"""What an agent is and what it gives back; and a conversation, which most agents hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from postroad.config import Recipe
from postroad.messages import Task, ToolResult, VersionSpan
from postroad_rollout.worker.errors import AgentSettingsError, RefusedByEngine
from postroad_rollout.worker.model_client import Completion, ModelClient


@dataclass(frozen=True)
class Attempt:
    """One finished attempt. The arrays [T] are aligned to `tokens`, as in messages.Trajectory; the last of `messages`
    is the response that is graded."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    log_probabilities: np.ndarray
    versions: list[VersionSpan]
    messages: list[dict[str, Any]]
    finish_reason: Literal["stop", "length", "tool_calls"]
    engine: str = ""
    routed_experts: np.ndarray | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Agent(Protocol):
    """It may have `check(recipe)` too, which raises AgentSettingsError for a recipe that it can't work in."""

    async def run(self, task: Task, model: ModelClient) -> Attempt: ...


async def recorded(model: ModelClient, metrics: dict[str, float] | None = None) -> Attempt:
    """The attempt as the router has it: all turns of the member's session, up to the newest."""
    found = await model.trajectory()
    return Attempt(
        found.tokens, found.loss_mask, found.log_probabilities, found.versions, found.messages, found.finish_reason,
        found.engine, found.routed_experts, {**found.metrics, **(metrics or {})},
    )  # fmt: skip


class Conversation:
    """`messages` so far: what the model said, and what was said to it, which is not trained."""

    def __init__(self, task: Task, model: ModelClient) -> None:
        self._model = model
        self.messages = list(task.prompt)
        self.metrics = {"turns": 0.0, "tool_calls": 0.0, "tool_failures": 0.0, "out_of_room": 0.0}

    async def turn(self, *, tools: list[dict[str, Any]] | None = None, stop: tuple[str, ...] = ()) -> Completion | None:
        """What the model says next; None where it has no more to say, because it was cut off or has no room for a further
        turn of `max_new_tokens`."""
        try:
            said = await self._model.complete(self.messages, tools=tools, stop=stop)
        except RefusedByEngine:
            if not self.metrics["turns"]:
                raise
            self.metrics["out_of_room"] = 1.0
            return None
        self.metrics["turns"] += 1
        self.messages.append(said.message)
        return None if said.finish_reason == "length" else said

    async def call(self, name: str, arguments: dict[str, Any] | str) -> ToolResult:
        result = await self._model.tools.call(name, arguments)
        self.metrics["tool_calls"] += 1
        self.metrics["tool_failures"] += result.status != "ok"
        return result

    async def attempt(self) -> Attempt:
        return await recorded(self._model, self.metrics)


def check_tool(recipe: Recipe, name: str) -> None:
    """Raises AgentSettingsError where the recipe has no such tool; an MCP server's are not known before it runs."""
    known = [tool.called for tool in recipe.tools if tool.kind != "mcp"]
    if name not in known and len(known) == len(recipe.tools):
        raise AgentSettingsError(f"the agent calls a tool {name!r}; the recipe's tools are {known or 'none'}")
