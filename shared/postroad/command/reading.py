"""`postroad steps`, `sample`, `audit` and `replay`: what the logs hold, of a live run, an ended or a crashed one."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from postroad.audit import read_audit
from postroad.bus import LoggedMessage
from postroad.command.folders import REFUSED, AsJson, Dir, chosen
from postroad.messages import Sample, Step
from postroad.supervisor.folder import FolderError, RunFolder
from postroad.supervisor.opened import opened

FLAT = ("reward_mean", "logprob_abs_diff_mean")
TEXT_CHARACTERS = 2000


def steps(dir: Dir = None, json_: AsJson = False) -> None:
    """The step log: one JSON object a line, or a table."""
    rows = asyncio.run(_read_steps(chosen(dir)))
    if json_:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    names = ("step", "version", "reward_mean", "staleness_max", "logprob_abs_diff_mean", "seconds", "digest")
    table = Table(*names, box=None)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    Console().print(table)


async def _read_steps(folder: RunFolder | None) -> list[dict[str, Any]]:
    async with opened(folder) as run:
        return [
            step_row(entry.message)
            async for entry in run.bus.replay("STEPS")
            if isinstance(entry, LoggedMessage) and isinstance(entry.message, Step)
        ]


def step_row(step: Step) -> dict[str, Any]:
    return {
        "step": step.number, "version": step.version, "digest": step.digest, "samples": step.samples,
        "groups": step.groups, "dropped": [group.model_dump() for group in step.dropped],
        **{name: step.metrics.get(name) for name in FLAT}, "staleness_max": step.staleness_max,
        "seconds": step.seconds, "created": step.created, "metrics": step.metrics,
    }  # fmt: skip


def sample(
    id: Annotated[str, typer.Argument(help="GROUP.MEMBER, as `postroad steps` prints it.")],
    dir: Dir = None,
    json_: AsJson = False,
) -> None:
    """One sample: what was said, what it got, and which weights said it."""
    found = asyncio.run(_read_sample(chosen(dir), id))
    if json_:
        typer.echo(json.dumps(found))
        return
    console = Console()
    for message in found["messages"]:
        console.print(f"[bold]{message.get('role')}[/]: ", end="")
        console.print(str(message.get("content"))[:TEXT_CHARACTERS], markup=False)
    table = Table.grid(padding=(0, 2))
    for name, value in found.items():
        if name != "messages":
            table.add_row(name, json.dumps(value) if isinstance(value, (dict, list)) else _cell(value))
    console.print(table)


async def _read_sample(folder: RunFolder | None, name: str) -> dict[str, Any]:
    group, _, member = name.rpartition(".")
    if not group or not member.isdigit():
        raise FolderError(f"{name!r} is no sample: its id is GROUP.MEMBER, such as g00000003.1")
    async with opened(folder) as run:
        try:
            subject = run.bus.subjects.sample(group, int(member))
        except ValueError as error:
            raise FolderError(f"{name!r} is no sample: {error}") from error
        logged = await run.bus.last("SAMPLES", subject)
    if logged is None or not isinstance(logged.message, Sample):
        raise FolderError(f"SAMPLES holds no {name}: `postroad steps --json` lists those that were trained")
    return sample_row(logged.message, logged.sequence)


def sample_row(found: Sample, sequence: int) -> dict[str, Any]:
    trajectory = found.trajectory
    mask = trajectory.loss_mask.astype(bool)
    log_probabilities = trajectory.log_probabilities[mask]
    return {
        "id": found.id, "sequence": sequence, "reward": found.reward, "metrics": found.metrics,
        "messages": trajectory.messages, "finish_reason": trajectory.finish_reason, "tokens": len(trajectory.tokens),
        "trained_tokens": int(mask.sum()),
        "logprobs": {
            "mean": float(np.mean(log_probabilities)), "min": float(np.min(log_probabilities)),
            "sum": float(np.sum(log_probabilities)),
        } if len(log_probabilities) else None,
        "versions": [span.model_dump() for span in trajectory.versions], "mask": _runs(mask),
        "routed_experts": None if trajectory.routed_experts is None else list(trajectory.routed_experts.shape),
        "engine": trajectory.engine, "row": trajectory.task.row, "seconds": trajectory.seconds,
        "grading_seconds": found.seconds,
    }  # fmt: skip


def _runs(mask: np.ndarray) -> list[list[int]]:
    """[start, end) of the trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return [[int(start), int(end)] for start, end in edges.reshape(-1, 2)]


def audit(dir: Dir = None, json_: AsJson = False) -> None:
    """Where every finished attempt went; lost, twice and wrong_version must be 0."""
    counts = asyncio.run(_read_audit(chosen(dir)))
    if json_:
        typer.echo(json.dumps(counts))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in counts.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    Console().print(table)


async def _read_audit(folder: RunFolder | None) -> dict[str, Any]:
    async with opened(folder) as run:
        return await read_audit(run.bus, staleness=run.recipe.trainer.staleness, finished=run.finished)


def replay(
    steps: Annotated[str, typer.Option("--steps", metavar="A:B", help="First and last step, both included.")],
    dir: Dir = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: digests will differ.")] = None,
    json_: AsJson = False,
) -> None:
    """Train logged steps again and compare the digests; exit code 1 where one differs."""
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        typer.echo(f"postroad: --steps {steps!r} is not of the form A:B with 1 <= A <= B", err=True)
        raise typer.Exit(REFUSED)
    arguments = ["--steps", steps, *(["--json"] if json_ else []), *(x for key in set or [] for x in ("--set", key))]
    raise typer.Exit(asyncio.run(_replay(chosen(dir), arguments)))


async def _replay(folder: RunFolder | None, arguments: list[str]) -> int:
    async with opened(folder) as run:
        environment = {**run.environment, "POSTROAD_NAME": "replay", "POSTROAD_LOG_LEVEL": "WARNING"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "postroad_trainer.replay", *arguments, env=environment
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
