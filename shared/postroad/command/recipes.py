"""`postroad recipe check`, `postroad recipe reference` and `postroad recipe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postroad.command.folders import Commands
from postroad.command.grader import check_grader
from postroad.command.planning import plan
from postroad.config import Recipe, load_recipe
from postroad.config.reference import reference as reference_page
from postroad.supervisor.plan import services

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look at recipes.")

app.command()(plan)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    set: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: a.b=c.")] = None,
) -> None:
    """Say in words what a recipe means."""
    loaded = load_recipe(recipe, set or [])
    check_grader(loaded)
    typer.echo("\n".join(meaning(loaded)))


@app.command()
def reference() -> None:
    """Print the page of all settings."""
    typer.echo(reference_page(), nl=False)


def meaning(recipe: Recipe) -> list[str]:
    """The recipe in sentences, with the numbers that follow from it."""
    trainer, rollout, sampling = recipe.trainer, recipe.rollout, recipe.rollout.sampling
    samples = trainer.groups_per_step * rollout.group_size
    outstanding = (trainer.staleness + 1) * trainer.groups_per_step
    processes = [service.name for service in services(recipe)]
    model = recipe.model.bundled or recipe.model.path
    if trainer.algorithm.supervised:
        return [
            f"Run {recipe.name!r} trains {model} in {recipe.model.dtype} for {trainer.steps} steps by {trainer.algorithm.name}.",
            f"A step takes {trainer.groups_per_step * recipe.group_size} conversations of {_source(recipe)}.",
            *(f"Evaluation {e.name!r}: the loss of {e.rows} held-out conversations." for e in recipe.evaluation),
            f"Processes: nats, valkey, {', '.join(processes)} ({len(processes) + 2}).",
            _memory(recipe),
        ]
    return [
        f"Run {recipe.name!r} trains {model} in {recipe.model.dtype} for {trainer.steps} steps.",
        f"A step takes {trainer.groups_per_step} prompts with {rollout.group_size} attempts each: {samples} samples, "
        f"and at most {samples * sampling.max_new_tokens:,} generated tokens.",
        f"The whole run generates at most {trainer.steps * samples * sampling.max_new_tokens:,} tokens in "
        f"{trainer.steps * samples:,} samples.",
        f"Prompts come from {_source(recipe)}; {recipe.reward.grader} grades within {recipe.reward.deadline_s:g} s.",
        _staleness(trainer.staleness, outstanding),
        f"A group is given up {rollout.deadline_s:g} s after it was asked for; what fails is tried again up to "
        f"{rollout.deliveries} times, a grading {recipe.reward.deliveries} times.",
        *(["Groups whose rewards are all equal are dropped and replaced."] if trainer.filter == "zero_std" else []),
        *(
            f"Evaluation {e.name!r}: {e.rows} held-out prompts, at most {e.sampling.max_new_tokens} tokens, at the start "
            f"and the end{f' and every {e.every} steps' if e.every else ''}."
            for e in recipe.evaluation
        ),
        f"Processes: nats, valkey, {', '.join(processes)} ({len(processes) + 2}).",
        _memory(recipe),
    ]


def _source(recipe: Recipe) -> str:
    data = recipe.data
    if data.kind == "reasoning_gym":
        return f"reasoning-gym's {data.task} ({data.size} rows, seed {data.seed})"
    return f"{data.path}"


def _staleness(staleness: int, outstanding: int) -> str:
    if staleness == 0:
        return f"Generation and training take turns (on-policy): at most {outstanding} groups are outstanding."
    return (
        f"Generation runs ahead of training: at most {outstanding} groups are outstanding, and no token is more than "
        f"{staleness} version{'s' if staleness > 1 else ''} old."
    )


def _memory(recipe: Recipe) -> str:
    """A guess from the weights' size on disk: the engine's copy and staging, the trainer's parameters, gradients, two
    moments and master weights in float32, and two snapshots."""
    from postroad.supervisor.checks import model_folder

    files = list(model_folder(recipe).glob("*.safetensors"))
    if not files:
        return "Memory: not known before the model's folder exists."
    weights = sum(file.stat().st_size for file in files)
    parameters = weights / 2 if recipe.model.dtype == "bfloat16" else weights / 4
    trainer = recipe.trainer.processes * parameters * 18 + 2 * weights
    engines = 0 if recipe.trainer.algorithm.supervised else recipe.rollout.engines * 2 * weights
    return f"Memory: about {(trainer + engines) / 1024**3 + 1.5:.1f} GiB, of which 1.5 beside the model."
