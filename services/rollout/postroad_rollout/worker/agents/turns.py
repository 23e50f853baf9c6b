"""Agents of one turn, and of turns with tools that the model calls by its own format, which the router parses."""

from __future__ import annotations

import asyncio
from typing import Any

from postroad.config import Recipe
from postroad.messages import Task
from postroad_rollout.worker.agents.base import Attempt, Conversation, check_tool, recorded
from postroad_rollout.worker.errors import AgentSettingsError
from postroad_rollout.worker.model_client import ModelClient


class SingleTurn:
    """The prompt, and one answer."""

    async def run(self, task: Task, model: ModelClient) -> Attempt:
        await model.complete(task.prompt)
        return await recorded(model)


class ToolLoop:
    """The model calls `tools` (all of the recipe's where None) until it answers without a call, at most `max_turns`
    times. The calls of one turn are made side by side."""

    def __init__(self, max_turns: int = 16, tools: list[str] | None = None) -> None:
        self.max_turns, self.tools = max_turns, tools

    def check(self, recipe: Recipe) -> None:
        if not recipe.tools:
            raise AgentSettingsError("the agent tool_loop needs tools: list them in the recipe's section tools")
        for name in self.tools or ():
            check_tool(recipe, name)

    async def run(self, task: Task, model: ModelClient) -> Attempt:
        talk, schemas = Conversation(task, model), await model.tools.schemas(self.tools)
        for turn in range(1, self.max_turns + 1):
            said = await talk.turn(tools=schemas)
            calls = said.message.get("tool_calls") if said is not None else None
            if not calls or turn == self.max_turns:
                break
            talk.messages += await asyncio.gather(*(self._result(talk, call) for call in calls))
        return await talk.attempt()

    async def _result(self, talk: Conversation, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        result = await talk.call(function["name"], function.get("arguments") or "")
        content = result.content if result.status == "ok" else f"{result.status}: {result.content}"
        return {"role": "tool", "tool_call_id": call.get("id") or "", "name": function["name"], "content": content}
