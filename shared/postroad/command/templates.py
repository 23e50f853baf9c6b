"""`postroad template check`: the router's own check, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import typer

app = typer.Typer(no_args_is_help=True, help="Chat templates.")


@app.command("check", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(
    context: typer.Context, path: str = typer.Argument(help="A model's folder, or a file with a template.")
) -> None:
    """Try whether conversations can go on by appending tokens alone; --family NAME picks the rules for a file."""
    command = [sys.executable, "-m", "postroad_router.template_check", path, *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
