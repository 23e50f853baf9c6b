"""`postroad ps`, `status`, `top` and `logs`: what the mesh does now."""

from __future__ import annotations

import asyncio
import json
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from postroad.bus import LoggedMessage
from postroad.command.folders import AsJson, Dir, chosen, embedded
from postroad.messages import Step
from postroad.supervisor.child import tail
from postroad.supervisor.folder import FolderError, RunFolder
from postroad.supervisor.members import Member, of_process, read_members
from postroad.supervisor.opened import OpenedRun, Unreachable, opened, reached
from postroad.supervisor.state import ProcessRecord, Progress, StateRecord

TOP_INTERVAL_S = 1.0
LOG_INTERVAL_S = 0.2
MEMBERS_S = 3.0


def ps(dir: Dir = None, json_: AsJson = False) -> None:
    """The mesh's processes."""
    rows = asyncio.run(read_processes(chosen(dir)))
    if json_:
        typer.echo(json.dumps(rows))
    else:
        Console().print(process_table(rows))


def status(dir: Dir = None, json_: AsJson = False) -> None:
    """What the run does and how far it is."""
    values = asyncio.run(read_status(chosen(dir)))
    if json_:
        typer.echo(json.dumps(values))
    else:
        Console().print(status_table(values))


def top(dir: Dir = None) -> None:
    """The same, live; q or Ctrl-C ends it."""
    folder = chosen(dir)
    with _keys() as pressed, Live(console=Console(), auto_refresh=False, screen=True) as live:
        while not pressed("q", TOP_INTERVAL_S):
            live.update(Group(*asyncio.run(_screen(folder))), refresh=True)


def logs(
    service: Annotated[str, typer.Argument(help="The name of a process, as `postroad ps` prints it, or supervisor.")],
    dir: Dir = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing what comes.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines from the end to begin with.")] = 50,
) -> None:
    """The log of a process."""
    folder = embedded(dir)
    log = folder.logs / f"{service}.log"
    if not log.exists():
        known = ", ".join(sorted(path.stem for path in folder.logs.glob("*.log"))) or "none yet"
        raise FolderError(f"there is no log of {service!r} in {folder.logs}; there are: {known}")
    place = log.stat().st_size
    typer.echo(tail(log, lines))
    while follow:
        place = _print_from(log, place)
        time.sleep(LOG_INTERVAL_S)


def _print_from(log: Path, place: int) -> int:
    with log.open("rb") as file:
        file.seek(place)
        sys.stdout.write(file.read().decode(errors="replace"))
        sys.stdout.flush()
        return file.tell()


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────
async def read_processes(folder: RunFolder | None) -> list[dict[str, Any]]:
    """A row per process: kind, name, pid, port, restarts, version, state."""
    if folder is None:
        async with opened(None) as run:
            return [_member_row(member) for member in await read_members(run.store)]
    state = _state_of(folder)
    live = folder.live() is not None
    members = await _members(folder) if live else []
    return [_process_row(process, members, live) for process in state.processes]


def _process_row(process: ProcessRecord, members: list[Member], live: bool) -> dict[str, Any]:
    row: dict[str, Any] = process.model_dump(include={"kind", "name", "pid", "port", "restarts", "version", "state"})
    if not live:
        return row | {"pid": None, "version": None, "state": "stopped"}
    member = of_process(members, process.pid) if process.pid is not None else None
    return row if member is None else row | {"version": member.version, "port": member.port or process.port}


def _member_row(member: Member) -> dict[str, Any]:
    return {
        "kind": member.kind, "name": member.name, "pid": member.pid, "port": member.port, "restarts": None,
        "version": member.version, "state": "ready",
    }  # fmt: skip


async def read_status(folder: RunFolder | None) -> dict[str, Any]:
    if folder is None:
        async with opened(None) as run:
            return await _status_from_logs(run, "")
    state, pid = _state_of(folder), folder.live()
    if pid is None and not state.over:
        reason = f"its supervisor (process {state.supervisor}) was killed; `postroad up` with the same folder goes on"
        async with opened(folder) as run:
            return await _status_from_logs(run, reason) | {"folder": str(folder.path), "supervisor": None}
    members = await _members(folder) if pid is not None else []
    engines = [_engine(m.name, m.pid, m.version, m.info) for m in members if m.kind == "engine"]
    return {
        "run": state.run, "folder": str(folder.path), "state": state.state, "reason": state.reason,
        "step": state.progress.step, "steps": state.progress.steps, "version": state.progress.version,
        "staleness_max": state.progress.staleness_max, "reward_mean": state.progress.reward_mean, "engines": engines,
        "evaluations": state.evaluations, "audit": state.audit, "supervisor": pid,
    }  # fmt: skip


def _state_of(folder: RunFolder) -> StateRecord:
    """What the supervisor wrote last. Raises FolderError where none ever did."""
    state = folder.state()
    if state is None:
        raise FolderError(f"the run in {folder.path} was never started: `postroad up` starts it")
    return state


async def _status_from_logs(run: OpenedRun, reason: str) -> dict[str, Any]:
    """Without a supervisor to ask: what the step log says. With a `reason`, the run has ended early."""
    progress = Progress(steps=run.recipe.trainer.steps)
    async for entry in run.bus.replay("STEPS"):
        if isinstance(entry, LoggedMessage) and isinstance(entry.message, Step):
            progress.add(entry.message)
    members = await read_members(run.store) if run.live else []
    evaluations = {e.name: await run.store.get(f"evaluation:{e.name}") or {} for e in run.recipe.evaluation}
    if reason:
        state = "failed"
    elif (progress.step or 0) >= progress.steps:
        state = "finished"
    else:
        state = "running" if any(member.kind == "trainer" for member in members) else "starting"
    return {
        "run": run.run, "folder": None, "state": state, "reason": reason, "step": progress.step,
        "steps": progress.steps, "version": progress.version, "staleness_max": progress.staleness_max,
        "reward_mean": progress.reward_mean,
        "engines": [_engine(m.name, m.pid, m.version, m.info) for m in members if m.kind == "engine"],
        "evaluations": evaluations, "audit": None, "supervisor": None,
    }  # fmt: skip


def _engine(name: str, pid: int | None, version: int | None, info: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "pid": pid, "version": version, "digest": info.get("digest"), "state": info.get("state"),
        "running": info.get("running"),
    }  # fmt: skip


async def _members(folder: RunFolder) -> list[Member]:
    """The registered members of a live run; none while its servers do not answer."""
    try:
        async with asyncio.timeout(MEMBERS_S), reached(folder) as run:
            return await read_members(run.store)
    except (Unreachable, TimeoutError):
        return []


# ── how it is shown ──────────────────────────────────────────────────────────────────────────────────────────────
def process_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("name", "kind", "pid", "port", "version", "restarts", "state", box=None)
    for row in rows:
        cells = (row[name] for name in ("name", "kind", "pid", "port", "version", "restarts", "state"))
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    return table


def status_table(values: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    engines = ", ".join(f"{engine['name']} version {engine['version']}" for engine in values["engines"])
    for name, value in (
        ("run", values["run"]), ("state", values["state"]), ("reason", values["reason"]),
        ("step", f"{values['step'] or 0} of {values['steps']}"), ("version", values["version"]),
        ("reward", values["reward_mean"]), ("staleness", values["staleness_max"]), ("engines", engines),
    ):  # fmt: skip
        if value not in ("", None):
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    return table


async def _screen(folder: RunFolder | None) -> list[Table]:
    return [status_table(await read_status(folder)), process_table(await read_processes(folder))]


@contextmanager
def _keys() -> Iterator[Any]:
    """A function (key, seconds) that waits and says whether the key was pressed. Ctrl-C counts as the key."""
    if not sys.stdin.isatty():
        raise FolderError("`postroad top` needs a terminal; `postroad status --json` does not")
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(key: str, timeout_s: float) -> bool:
        ready, _, _ = select.select([descriptor], [], [], timeout_s)
        return bool(ready) and sys.stdin.read(1) == key

    try:
        tty.setcbreak(descriptor)
        yield pressed
    except KeyboardInterrupt:
        return
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
