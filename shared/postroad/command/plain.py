"""A run as plain lines: one a step and one for each change, and the summary that ends every finished run."""

from __future__ import annotations

import time
from typing import Any

from postroad.audit import audit_line
from postroad.config import Recipe
from postroad.messages import Step
from postroad.supervisor.state import StateRecord
from postroad.supervisor.view import View


class PlainView(View):
    def __init__(self, recipe: Recipe) -> None:
        self._began = time.time()
        self._steps = recipe.trainer.steps
        self._state = ""
        self._processes: dict[str, tuple[str, int]] = {}

    def changed(self, state: StateRecord) -> None:
        for process in state.processes:
            now = (process.state, process.restarts)
            if self._processes.get(process.name) == now:
                continue
            self._processes[process.name] = now
            if process.state in ("ready", "backoff"):
                restarts = f", restarts {process.restarts}" if process.restarts else ""
                _say(f"{process.name} {'ready' if process.state == 'ready' else 'died'}{restarts}")
        if state.state != self._state:
            self._state = state.state
            _say(f"run {state.run} {state.state}" + (f": {state.reason}" if state.reason else ""))

    def step(self, step: Step, state: StateRecord) -> None:
        if step.created >= self._began and step.number:
            _say(step_line(step, self._steps))

    def ended(self, state: StateRecord) -> None:
        if state.state == "finished":
            _say(summary(state))


def step_line(step: Step, steps: int) -> str:
    reward = step.metrics.get("reward_mean", float("nan"))
    return (
        f"step {step.number}/{steps} reward {reward:.3f} staleness {step.staleness_max} seconds {step.seconds:.1f}"
        f" version {step.version}"
    )


def first_evaluation(state: StateRecord) -> tuple[str, float, float] | None:
    """What the first evaluation measures, accuracy or loss, at its first and its last version."""
    for values in state.evaluations.values():
        if values:
            versions = sorted(values, key=int)
            first, last = values[versions[0]], values[versions[-1]]
            name = "loss" if "loss" in first else "accuracy"
            return name, first[name], last[name]
        return None
    return None


def summary(state: StateRecord) -> str:
    """The last line of a finished run."""
    audit: dict[str, Any] | None = state.audit
    line = audit_line(audit) if audit is not None else "audit: not made, see logs/supervisor.log"
    if (evaluation := first_evaluation(state)) is None:
        return line
    name, before, after = evaluation
    return f"held-out {name} before {before:.3f} after {after:.3f}; {line}"


def _say(line: str) -> None:
    print(line, flush=True)
