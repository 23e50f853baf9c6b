"""`postroad dead list|retry|drop`: what exhausted its deliveries, with its reason; and what is to become of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any
from uuid import uuid4

import typer
from rich.console import Console
from rich.table import Table

from postroad.bus import Bus, LoggedMessage
from postroad.command.folders import REFUSED, AsJson, Commands, Dir, chosen
from postroad.messages import DeadLetter
from postroad.supervisor.opened import opened

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look at dead letters, try them again, or drop them.")

DEADLINE_S = 10.0
Numbers = Annotated[list[int] | None, typer.Argument(help="Numbers of letters, as `postroad dead list` prints them.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Only letters with this reason, such as timeout.")]
All = Annotated[bool, typer.Option("--all", help="All letters (of --reason, where it is given).")]


@app.command("list")
def list_(dir: Dir = None, json_: AsJson = False, reason: Reason = None) -> None:
    """One letter a line; with --json in full, traceback included, but for the payload's bytes."""
    letters = asyncio.run(_read(chosen(dir), reason))
    if json_:
        for number, letter in letters:
            typer.echo(json.dumps(_row(number, letter)))
        return
    table = Table("number", "reason", "of", "when", "error", box=None)
    for number, letter in letters:
        when = datetime.fromtimestamp(letter.created).strftime("%m-%d %H:%M:%S")
        table.add_row(
            str(number), letter.reason, _name(letter), when, letter.error.splitlines()[0][:100] if letter.error else ""
        )
    Console().print(table)


@app.command()
def retry(numbers: Numbers = None, dir: Dir = None, all: All = False, reason: Reason = None) -> None:
    """Put letters back onto the stream they came from, as they were; the services work on them again."""
    _each(numbers, dir, everything=all, reason=reason, work=_retry, word="put back")


@app.command()
def drop(numbers: Numbers = None, dir: Dir = None, all: All = False, reason: Reason = None) -> None:
    """Remove letters for good."""
    _each(numbers, dir, everything=all, reason=reason, work=_drop, word="dropped")


Work = Callable[[Bus, int, DeadLetter], Awaitable[None]]


def _each(numbers: list[int] | None, dir: Any, *, everything: bool, reason: str | None, work: Work, word: str) -> None:
    if bool(numbers) == everything:
        typer.echo("postroad: name the letters' numbers, or --all, not both", err=True)
        raise typer.Exit(REFUSED)
    wanted = set(numbers or ())

    async def run() -> set[int]:
        done = set()
        async with opened(chosen(dir)) as run:
            letters = [entry async for entry in _letters(run.bus, reason) if everything or entry[0] in wanted]
            if missing := wanted - {number for number, _ in letters}:
                return missing
            for number, letter in letters:
                await work(run.bus, number, letter)
                done.add(number)
        typer.echo(f"{len(done)} {'letter' if len(done) == 1 else 'letters'} {word}")
        return set()

    if missing := asyncio.run(run()):
        typer.echo(
            f"postroad: there is no letter {', '.join(map(str, sorted(missing)))}: see postroad dead list", err=True
        )
        raise typer.Exit(REFUSED)


async def _retry(bus: Bus, number: int, letter: DeadLetter) -> None:
    """Published first and only then removed: a crash in between leaves a letter too many, whose work is found done."""
    headers = {"Nats-Msg-Id": uuid4().hex}  # not the first one, which the server would take for a duplicate
    await bus.jetstream.publish(letter.source, letter.payload, timeout=DEADLINE_S, headers=headers)
    await _drop(bus, number, letter)


async def _drop(bus: Bus, number: int, letter: DeadLetter) -> None:
    await asyncio.wait_for(bus.jetstream.delete_msg("DEAD", number), DEADLINE_S)


async def _read(folder: Any, reason: str | None) -> list[tuple[int, DeadLetter]]:
    async with opened(folder) as run:
        return [entry async for entry in _letters(run.bus, reason)]


async def _letters(bus: Bus, reason: str | None) -> AsyncIterator[tuple[int, DeadLetter]]:
    async for entry in bus.replay("DEAD"):
        if (
            isinstance(entry, LoggedMessage)
            and isinstance(entry.message, DeadLetter)
            and reason in (None, entry.message.reason)
        ):
            yield entry.sequence, entry.message


def _row(number: int, letter: DeadLetter) -> dict[str, Any]:
    return {
        "number": number,
        "of": _name(letter),
        **letter.model_dump(exclude={"payload"}),
        "size_bytes": len(letter.payload),
    }


def _name(letter: DeadLetter) -> str:
    return letter.group if letter.member is None else f"{letter.group}.{letter.member}"
