"""`postroad recipe plan`: how a model lies over trainer and engine ranks, from its shapes alone. Nothing is loaded.

Memory is of parameters, gradients, masters and moments; activations and the KV cache come on top. Reads are those of one
engine rank for one version: each part of its shard from one of the trainer ranks that hold it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from postroad.config import Recipe, RecipeError, load_recipe
from postroad.config.shapes import Tensor, tensors_of
from postroad.weights.slices import Box, cells, intersection, shape_of, shard, spread, whole

WEIGHT, GRADIENT, MASTER, MOMENTS = 2, 4, 4, 8  # bytes of a parameter: bfloat16, then float32
GIB = 1024**3


@dataclass(frozen=True)
class Estimate:
    """Bytes; of the fullest rank where ranks differ. `reads` and `sources` are of one engine rank and version."""

    parameters: int
    trainer_rank_bytes: int
    engine_rank_bytes: int
    read_bytes: int
    reads: int
    sources: int
    fullest_source_share: float


class Layout:
    """Who holds which box of a tensor. Raises RecipeError where the layout does not divide the model."""

    def __init__(self, recipe: Recipe, model: dict[str, Any]) -> None:
        self.parallel, self.ranks = recipe.trainer.parallel, recipe.trainer.processes
        self.model, p = model, recipe.trainer.parallel
        self.stage_ranks = self.ranks // p.pipeline
        options = recipe.rollout.engine.sglang.options
        self.engine_tensor, self.engine_expert = int(options.get("tp-size", 1)), int(options.get("ep-size", 1))
        for value, parts, words in (
            (model["num_hidden_layers"], p.pipeline * p.virtual_pipeline, "layers over pipeline stages"),
            (model["num_key_value_heads"], p.tensor, "key heads over tensor ranks"),
            (model.get("num_experts") or p.expert, p.expert, "experts over expert ranks"),
            (model.get("num_experts") or self.engine_expert, self.engine_expert, "experts over the engine's ep-size"),
        ):
            if value % parts:
                raise RecipeError(f"{value} {words}: {value} is not a multiple of {parts}")

    def stage(self, tensor: Tensor) -> int:
        p = self.parallel
        if tensor.layer is None:
            return 0 if tensor.first else p.pipeline - 1
        chunk = self.model["num_hidden_layers"] // (p.pipeline * p.virtual_pipeline)
        return int(tensor.layer // chunk % p.pipeline)

    def holders(self, tensor: Tensor) -> list[tuple[Box, list[str]]]:
        """Boxes of the tensor with the trainer ranks that hold each."""
        p, stage = self.parallel, self.stage(tensor)
        tensor_ranks = p.tensor if tensor.expert is None else p.expert_tensor
        held: dict[Box, list[str]] = {}
        for rank in range(self.stage_ranks):
            if tensor.expert is not None:
                owner = rank // p.expert_tensor % p.expert
                if tensor.expert // (self.model["num_experts"] // p.expert) != owner:
                    continue
            box = whole(tensor.shape) if tensor.split is None else _part(tensor, rank % tensor_ranks, tensor_ranks)
            held.setdefault(box, []).append(f"{stage}.{rank}")
        return list(held.items())

    def engine_box(self, tensor: Tensor, rank: int = 0) -> Box | None:
        """What engine rank `rank` of one replica takes of the tensor."""
        if tensor.expert is not None and self.engine_expert > 1:
            ranks = self.engine_tensor // self.engine_expert
            if tensor.expert // (self.model["num_experts"] // self.engine_expert) != rank // ranks:
                return None
            return _part(tensor, rank % ranks, ranks)
        return whole(tensor.shape) if tensor.split is None else _part(tensor, rank, self.engine_tensor)

    def bytes_of_parameter(self, tensor: Tensor) -> float:
        p = self.parallel
        replicas = self.stage_ranks // (p.tensor if tensor.expert is None else p.expert * p.expert_tensor)
        share = replicas if p.distributed_optimizer else 1
        return WEIGHT + GRADIENT + (MASTER + MOMENTS) / share


def _part(tensor: Tensor, rank: int, ranks: int) -> Box:
    if ranks == 1 or tensor.split is None:
        return whole(tensor.shape)
    side = tensor.shape[tensor.split]
    if side % ranks and side < ranks * 128:
        return whole(tensor.shape)  # fewer key heads than ranks: each keeps them all
    return shard(tensor.shape, tensor.split, rank, ranks)


def estimate(recipe: Recipe, model: dict[str, Any]) -> Estimate:
    layout = Layout(recipe, model)
    trainer = [0.0] * recipe.trainer.parallel.pipeline
    parameters = engine = 0
    sizes: dict[int, int] = {}
    held: dict[str, list[int]] = {}
    for tensor in tensors_of(model):
        holders = layout.holders(tensor)
        parameters += math.prod(tensor.shape)
        on_rank = math.prod(shape_of(holders[0][0]))
        if tensor.expert is not None:
            on_rank = on_rank / recipe.trainer.parallel.expert  # type: ignore[assignment]
        trainer[layout.stage(tensor)] += on_rank * layout.bytes_of_parameter(tensor)
        wanted = layout.engine_box(tensor)
        if wanted is None:
            continue
        engine += math.prod(shape_of(wanted)) * WEIGHT
        for box, ranks in holders:
            for cell in cells(box, tensor.shape, _cuts(tensor, layout.engine_tensor), WEIGHT):
                if intersection(cell, wanted) is not None:
                    number = len(sizes)
                    sizes[number] = math.prod(shape_of(cell)) * WEIGHT
                    for rank in ranks:
                        held.setdefault(rank, []).append(number)
    plan = spread(sizes, held)
    loads = [sum(sizes[number] for number in numbers) for numbers in plan.values()]
    return Estimate(
        parameters, int(max(trainer)), 2 * engine, sum(sizes.values()), len(sizes), len(plan), max(loads) / sum(loads)
    )


def _cuts(tensor: Tensor, ranks: int) -> tuple[int, ...]:
    if tensor.split is None or tensor.shape[tensor.split] % ranks:
        return ()
    return tuple(ranks if dimension == tensor.split else 1 for dimension in range(len(tensor.shape)))


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    config: Annotated[Path | None, typer.Option(help="The model's config.json, where its folder is not here.")] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: a.b=c.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate memory and weight reads of each rank from the model's shapes; nothing is loaded."""
    loaded = load_recipe(recipe, set or [])
    file = config or Path(loaded.model.path or "") / "config.json"
    if not file.is_file():
        raise RecipeError(f"there is no {file}: give the model's config.json with --config")
    found = estimate(loaded, json.loads(file.read_text()))
    if json_:
        typer.echo(json.dumps(asdict(found)))
        return
    options = loaded.rollout.engine.sglang.options
    typer.echo(
        f"{found.parameters / 1e9:.2f} billion parameters on {loaded.trainer.processes} trainer ranks: at most "
        f"{found.trainer_rank_bytes / GIB:.1f} GiB a rank, activations not counted.\n"
        f"{loaded.rollout.engines} engines of {options.get('tp-size', 1)} GPUs: {found.engine_rank_bytes / GIB:.1f} GiB of "
        f"weights a GPU (served and staged), KV cache not counted.\n"
        f"A version: {found.reads} reads of together {found.read_bytes / GIB:.2f} GiB for each engine rank, from "
        f"{found.sources} trainer ranks; the busiest gives {found.fullest_source_share:.1%}."
    )
