"""What a run is doing, as an explicit state machine, and the file that says so to others."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from postroad.messages import Step

RunState = Literal["starting", "running", "finished", "failed", "stopped"]
ProcessState = Literal["waiting", "starting", "ready", "backoff", "stopped"]
MOVES: dict[RunState, frozenset[RunState]] = {
    "starting": frozenset({"running", "finished", "failed", "stopped"}),
    "running": frozenset({"finished", "failed", "stopped"}),
    "finished": frozenset(),
    "failed": frozenset(),
    "stopped": frozenset(),
}


class IllegalMove(RuntimeError):
    """The run can't go from this state to that one."""


class ProcessRecord(BaseModel):
    """`started` is in seconds since the epoch; `version` is of the weights that an engine serves or the trainer has."""

    kind: str
    name: str
    pid: int | None = None
    port: int | None = None
    version: int | None = None
    restarts: int = 0
    started: float | None = None
    state: ProcessState = "waiting"


class Progress(BaseModel):
    """What the step log says so far. `step` and `version` are None before the trainer has logged its start."""

    steps: int
    step: int | None = None
    version: int | None = None
    staleness_max: int = 0
    reward_mean: float | None = None

    def add(self, step: Step) -> None:
        """The next step of the log."""
        self.step, self.version = step.number, step.version
        self.staleness_max = max(self.staleness_max, step.staleness_max)
        self.reward_mean = step.metrics.get("reward_mean")


class StateRecord(BaseModel):
    """The whole of state.json."""

    run: str
    supervisor: int
    state: RunState = "starting"
    reason: str = ""
    since: float = Field(default_factory=time.time)
    progress: Progress
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)
    audit: dict[str, Any] | None = None
    processes: list[ProcessRecord] = Field(default_factory=list)

    def move(self, state: RunState, reason: str = "") -> None:
        """Raises IllegalMove; an end is an end."""
        if state not in MOVES[self.state]:
            raise IllegalMove(f"a run that is {self.state} can't become {state}")
        self.state, self.reason, self.since = state, reason, time.time()

    @property
    def over(self) -> bool:
        return not MOVES[self.state]


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace the file in one move: a reader finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.rename(path)


def read_state(path: Path) -> StateRecord | None:
    """The last state that was written, or None where no run was started here."""
    try:
        return StateRecord.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
