"""The `postroad` command. Fields and exit codes are stable and documented in docs/command.md."""

from __future__ import annotations

import typer

from postroad.command import chatting, dead, doctoring, looking, reading, recipes, running, templates
from postroad.command.folders import Commands

app = typer.Typer(
    name="postroad", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Post-train language models with reinforcement learning, on a mesh of services that loses nothing.",
)  # fmt: skip
app.command("up")(running.up)
app.command("down")(running.down)
app.command("ps")(looking.ps)
app.command("status")(looking.status)
app.command("top")(looking.top)
app.command("logs")(looking.logs)
app.command("steps")(reading.steps)
app.command("sample")(reading.sample)
app.command("audit")(reading.audit)
app.command("replay")(reading.replay)
app.command("chat")(chatting.chat)
app.command("doctor")(doctoring.doctor)
app.add_typer(recipes.app, name="recipe")
app.add_typer(dead.app, name="dead")
app.add_typer(templates.app, name="template")

if __name__ == "__main__":
    app()
