"""Agents: what turns a prompt into a trajectory by calling the model, once or in turns with tools.

An agent is a class that is built with the task's agent settings (without `kind`) and has
`async def run(self, task, model) -> Attempt`. `kind` is a name of AGENTS, or the dotted path of a user's class. What
`model` offers is in model_client: the model itself, `model.tools`, `model.peers` and `model.endpoint()`.
"""

from __future__ import annotations

import importlib
from typing import Any

from postroad_rollout.worker.agents.base import Agent, Attempt, Conversation, recorded
from postroad_rollout.worker.agents.black_box import BlackBox
from postroad_rollout.worker.agents.multi_agent import MultiAgent
from postroad_rollout.worker.agents.tagged import ReTool, SearchR1
from postroad_rollout.worker.agents.turns import SingleTurn, ToolLoop
from postroad_rollout.worker.errors import AgentSettingsError

__all__ = ["AGENTS", "Agent", "Attempt", "Conversation", "make_agent", "recorded"]

AGENTS: dict[str, type[Agent]] = {
    "single_turn": SingleTurn, "tool_loop": ToolLoop, "retool": ReTool, "search_r1": SearchR1, "multi_agent": MultiAgent,
    "black_box": BlackBox,
}  # fmt: skip


def make_agent(settings: dict[str, Any]) -> Agent:
    """The agent of a task. Raises AgentSettingsError."""
    kind = settings.get("kind")
    if not isinstance(kind, str):
        raise AgentSettingsError(f"agent.kind is {kind!r}; give one of {sorted(AGENTS)} or a class's dotted path")
    agent_class = AGENTS.get(kind) or _load(kind)
    try:
        return agent_class(**{key: value for key, value in settings.items() if key != "kind"})
    except TypeError as error:
        raise AgentSettingsError(f"agent {kind!r} does not take these settings: {error}") from error


def _load(path: str) -> type[Agent]:
    module, _, name = path.rpartition(".")
    if not module:
        raise AgentSettingsError(f"unknown agent {path!r}; known: {sorted(AGENTS)}, or give a class's dotted path")
    try:
        found: type[Agent] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AgentSettingsError(f"agent {path!r} can't be imported: {error}") from error
    if not callable(getattr(found, "run", None)):
        raise AgentSettingsError(f"agent {path!r} has no method run(task, model)")
    return found
