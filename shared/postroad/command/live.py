"""A run drawn on the terminal: start-up, progress with ETA, the reward curve, accuracy, engines and restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from postroad.command.plain import first_evaluation, summary
from postroad.config import Recipe
from postroad.messages import Step
from postroad.supervisor.state import StateRecord
from postroad.supervisor.view import View

INTERVAL_S = 0.5
CURVE_ROWS, CURVE_COLUMNS = 6, 72
BLOCKS = " ▁▂▃▄▅▆▇█"
COLOURS = {"ready": "green", "starting": "yellow", "waiting": "yellow", "backoff": "red", "stopped": "bright_black"}


class LiveView(View):
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._console = Console()
        self._folder = folder
        self._steps: list[Step] = []
        self._state: StateRecord | None = None
        self._began = time.time()
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(40), TextColumn("{task.percentage:.0f} %"),
            TextColumn("left"), TimeRemainingColumn(), auto_refresh=False,
        )  # fmt: skip
        self._bar = self._progress.add_task("", total=recipe.trainer.steps)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)

    def changed(self, state: StateRecord) -> None:
        self._state = state

    def step(self, step: Step, state: StateRecord) -> None:
        self._steps.append(step)
        self._progress.update(self._bar, completed=step.number)

    async def run(self) -> None:
        with self._live:
            try:
                while True:
                    self._live.update(self.render(), refresh=True)
                    await asyncio.sleep(INTERVAL_S)
            finally:
                self._live.update(self.render(), refresh=True)

    def ended(self, state: StateRecord) -> None:
        console = self._console
        if state.state == "finished":
            console.print(f"try the model: postroad chat --dir {self._folder}", highlight=False)
            console.print(summary(state), highlight=False, soft_wrap=True)
        else:
            console.print(f"run {state.run} {state.state}: {state.reason}", highlight=False, markup=False)

    def render(self) -> RenderableType:
        state = self._state
        if state is None:
            return Text("")
        parts: list[RenderableType] = [Text(_headline(state, time.time() - self._began), "bold")]
        trained = [step for step in self._steps if step.number]
        if state.state == "running" or trained:
            parts.append(self._progress)
        if trained:
            rewards = [step.metrics.get("reward_mean", 0.0) for step in trained]
            parts += [Text(_numbers(trained, state)), Text("\n".join(["reward", *curve(rewards)]), "cyan")]
        parts.append(_processes(state))
        return Panel(Group(*parts), title=f"postroad · {state.run}", title_align="left")


def _headline(state: StateRecord, seconds: float) -> str:
    if state.state != "starting":
        return f"{state.state}, {seconds:.0f} s"
    awaited = [process.name for process in state.processes if process.state != "ready"]
    return f"starting, {seconds:.0f} s: waiting for {', '.join(awaited) or 'NATS and Valkey'}"


def _numbers(trained: Sequence[Step], state: StateRecord) -> str:
    last = trained[-1]
    words = [f"reward {last.metrics.get('reward_mean', float('nan')):.3f}", f"staleness {last.staleness_max}"]
    if last.seconds > 0:
        tokens = last.metrics.get("response_tokens_mean", 0.0) * len(last.samples)
        words.append(f"{tokens / last.seconds:.0f} tokens/s")
    words.append(f"{last.seconds:.1f} s a step")
    if (difference := last.metrics.get("logprob_abs_diff_mean")) is not None:
        words.append(f"|Δ logprob| {difference:.4f}")
    if (evaluation := first_evaluation(state)) is not None:
        name, before, after = evaluation
        words.append(f"held-out {name} {before:.3f} → {after:.3f}")
    return "   ".join(words)


def curve(values: Sequence[float], rows: int = CURVE_ROWS, columns: int = CURVE_COLUMNS) -> list[str]:
    """A filled curve of block characters, `rows` high, with its bounds at the left. Many values share a column, which
    shows their mean; few values get several columns each."""
    width = max(columns // len(values), 1) if len(values) < columns else 1
    shares = np.array_split(np.array(values), min(len(values), columns))
    means = np.repeat([float(share.mean()) for share in shares], width)
    low, high = float(means.min()), float(means.max())
    levels = np.full(len(means), 4 * rows) if high == low else (means - low) / (high - low) * (8 * rows - 1) + 1
    lines = []
    for row in reversed(range(rows)):
        bound = f"{high:7.3f}" if row == rows - 1 else f"{low:7.3f}" if row == 0 else " " * 7
        cells = (int(min(max(level - 8 * row, 0), 8)) for level in levels)
        lines.append(f"{bound} ┤" + "".join(BLOCKS[cell] for cell in cells))
    return lines


def _processes(state: StateRecord) -> Table:
    table = Table.grid(padding=(0, 2))
    for process in state.processes:
        notes = [] if process.version is None else [f"version {process.version}"]
        notes += [f"restarts {process.restarts}"] if process.restarts else []
        table.add_row(process.name, Text(process.state, COLOURS[process.state]), " ".join(notes))
    return table
