"""Agents: what turns a prompt into a trajectory by calling the model, once or in turns with tools.

An agent is a class that is built with the task's agent settings (without `kind`) and has
`async def run(self, task, model) -> Attempt`. `kind` is a name of AGENTS, or the dotted path of a user's class.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from postroad.messages import Task, VersionSpan
from postroad_rollout.worker.errors import AgentSettingsError
from postroad_rollout.worker.model_client import ModelClient


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
    async def run(self, task: Task, model: ModelClient) -> Attempt: ...


class SingleTurn:
    """The prompt, and one answer."""

    async def run(self, task: Task, model: ModelClient) -> Attempt:
        await model.complete(task.prompt)
        return await recorded(model)


async def recorded(model: ModelClient) -> Attempt:
    """The attempt as the router has it: all turns of the member's session, up to the newest."""
    found = await model.trajectory()
    return Attempt(
        found.tokens, found.loss_mask, found.log_probabilities, found.versions, found.messages, found.finish_reason,
        found.engine, found.routed_experts, found.metrics,
    )  # fmt: skip


AGENTS: dict[str, type[Agent]] = {"single_turn": SingleTurn}


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
