"""`postroad up` and `postroad down`."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from postroad.command.folders import FAILED, Dir, embedded
from postroad.command.live import LiveView
from postroad.command.plain import PlainView, summary
from postroad.config import load_recipe
from postroad.supervisor.checks import check_model, make_bundled_model, model_folder
from postroad.supervisor.folder import FolderError, RunFolder, held
from postroad.supervisor.launch import LOG_FORMAT, Launch, detach

DOWN_DEADLINE_S = 60.0


def up(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    dir: Annotated[Path | None, typer.Option(help="The run's folder; by default ./runs/NAME.")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: a.b=c.")] = None,
    detach_: Annotated[bool, typer.Option("--detach", help="Return when the mesh is ready.")] = False,
    live: Annotated[bool, typer.Option("--live/--no-live", help="Draw on the terminal, or print lines.")] = True,
    keep: Annotated[bool, typer.Option("--keep", help="Let the mesh stay when the run has finished.")] = False,
) -> None:
    """Start a mesh and run the recipe to its end; on the folder of a run that has ended, go on with it."""
    wanted = load_recipe(recipe, set or [])
    folder = RunFolder(dir or Path("runs") / wanted.name)
    launch = Launch(folder, wanted, keep)
    launch.check()
    with held(folder, "supervisor"):
        _make_model(launch)
        launch.prepare()
        if detach_:
            state, reason = detach(launch)
            if state == "failed":
                typer.echo(f"postroad: the run failed: {reason}", err=True)
                raise typer.Exit(FAILED)
            typer.echo(f"{state}: {folder.path}")
            return
        state = _foreground(launch, live and sys.stdout.isatty())
    raise typer.Exit({"finished": 0, "stopped": 128 + signal.SIGINT}.get(state, FAILED))


def _foreground(launch: Launch, live: bool) -> str:
    logging.basicConfig(
        level=logging.INFO, format=LOG_FORMAT, filename=launch.folder.logs / "supervisor.log", force=True
    )
    return launch.run(LiveView(launch.recipe, launch.folder.path) if live else PlainView(launch.recipe))


def _make_model(launch: Launch) -> None:
    """Bundled models are made once for each environment."""
    place, name = model_folder(launch.recipe), launch.recipe.model.bundled
    if name is not None and not place.exists():
        with Console(stderr=True).status(f"making the bundled model {name} in {place}"):
            make_bundled_model(name, place)
    check_model(place)


def down(dir: Dir = None) -> None:
    """Stop a live run and wait until nothing of it runs any more; it can be resumed with `postroad up`."""
    folder = embedded(dir)
    pid = folder.live()
    if pid is None:
        raise FolderError(f"no run is live in {folder.path}")
    try:
        descriptor = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        if not select.select([descriptor], [], [], DOWN_DEADLINE_S)[0]:
            typer.echo(f"postroad: process {pid} did not stop within {DOWN_DEADLINE_S:.0f} s", err=True)
            raise typer.Exit(FAILED)
    except ProcessLookupError:
        pass  # it ended meanwhile
    state = folder.state()
    typer.echo(f"{state.state if state else 'stopped'}: {folder.path}")
    if state is not None and state.state == "finished":
        typer.echo(summary(state))
