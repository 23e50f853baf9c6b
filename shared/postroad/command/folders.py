"""Which run a command is about, and how expected faults are told: one sentence and an exit code, no traceback."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from redis.exceptions import RedisError
from typer.core import TyperGroup

from postroad.bus import BusError
from postroad.config import RecipeError
from postroad.config.environment import NEEDED
from postroad.store import StoreError
from postroad.supervisor.checks import Refused
from postroad.supervisor.folder import FolderError, RunFolder, newest_run
from postroad.supervisor.opened import Unreachable
from postroad.supervisor.servers import MissingServer

FAILED, REFUSED = 1, 2
_EXIT_CODES: Mapping[type[Exception], int] = {
    RecipeError: REFUSED,
    FolderError: REFUSED,
    Refused: REFUSED,
    MissingServer: REFUSED,
    BusError: FAILED,
    StoreError: FAILED,
    RedisError: FAILED,
    Unreachable: FAILED,
}

Dir = Annotated[Path | None, typer.Option("--dir", help="The run's folder; without it, the newest under ./runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, whose fields are those of docs/command.md.")]


class Commands(TyperGroup):
    """Turns expected faults into a sentence on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        logging.getLogger().addHandler(logging.NullHandler())  # what goes wrong is told below, once
        try:
            return super().invoke(ctx)
        except tuple(_EXIT_CODES) as error:
            typer.echo(f"postroad: {error}", err=True)
            raise typer.Exit(next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))) from error


def chosen(folder: Path | None) -> RunFolder | None:
    """The run to look at: --dir, else the one that POSTROAD_* describe (None, in a container), else the newest."""
    if folder is not None:
        run = RunFolder(folder)
        run.record()
        return run
    return None if all(os.environ.get(name) for name in NEEDED) else newest_run()


def embedded(folder: Path | None) -> RunFolder:
    """The run's folder, for what needs a supervisor. Raises FolderError."""
    run = chosen(folder)
    if run is None:
        raise FolderError("this mesh runs in containers, without a supervisor: use their own tools, or name a --dir")
    return run
