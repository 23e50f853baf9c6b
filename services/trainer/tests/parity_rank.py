"""One rank of the parity tests: many layouts in one process, each against the same step of a single process.

`python parity_rank.py RANK WORLD FOLDER`: FOLDER/cases.json names the cases; a reference of each batch lies beside it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backend_parts import backend, make_rows
from safetensors.torch import load_file, save_file

from postroad_trainer.backend import cpu_shim
from postroad_trainer.backend.parallel import dissolve
from postroad_trainer.batch import StepSettings, TrainRow

STEP = StepSettings(learning_rate=1e-3)


def rows_of(case: dict[str, Any]) -> list[TrainRow]:
    groups, members = (3, 4) if case["packing"] else (2, 2)
    return make_rows(groups, members, experts=tuple(case["experts"]) if case["experts"] else None)


def build(case: dict[str, Any], parallel: dict[str, Any]) -> Any:
    cut = {"micro_batch_tokens": 60} if case["packing"] else {"micro_batch_tokens": 20, "share_prompts": False}
    # Adam divides by a root near 0 otherwise, and noise of 1e-9 in a gradient would decide a step's sign
    return backend(Path(case["model"]), parallel, adam_eps=1e-5, **cut)


def write_reference(case: dict[str, Any], path: Path) -> None:
    """The step in this process alone: log-probabilities before it, gradients, parameters after it."""
    alone, rows = build(case, {}), rows_of(case)
    logprobs = np.concatenate(alone.logprobs(rows))
    recorded = (
        [torch.from_numpy(kept.astype(np.int32)) for kept in alone.record_experts(rows)] if case["experts"] else []
    )
    result = alone.train_step(rows, STEP)
    tensors = {"logprobs": torch.from_numpy(logprobs), "loss": torch.tensor([result.loss, result.grad_norm])}
    for entry in alone._state.entries:
        parts = alone._built.mapping.split(entry, entry.parameter.main_grad)
        tensors |= {f"gradient/{name}": part for name, part in zip(entry.names, parts, strict=True)}
    tensors |= {f"recorded/{number}": kept for number, kept in enumerate(recorded)}
    tensors |= {f"after/{name}": tensor.clone() for name, tensor in alone.export_weights()}
    save_file(tensors, path)


def compare(trained: Any, case: dict[str, Any], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest differences from the reference."""
    rows = rows_of(case)
    logprobs = torch.from_numpy(np.concatenate(trained.logprobs(rows)))
    recorded = trained.record_experts(rows) if case["experts"] else []
    other = [(want[f"recorded/{number}"].numpy() != kept).mean() for number, kept in enumerate(recorded)]
    result = trained.train_step(rows, STEP)
    mapping, gradient, router = trained._built.mapping, 0.0, 0.0
    for entry, own in zip(trained._state.entries, trained._state._owned, strict=True):
        pieces = [want[f"gradient/{p.name}"].narrow(p.dim, p.start, p.length) for p in mapping.pieces(entry)]
        flat, got = mapping.join(entry, pieces).reshape(-1), entry.parameter.main_grad.reshape(-1)
        if own is None:
            continue  # another rank has this gradient, reduced
        error = float((flat - got)[own.start : own.stop].abs().max())
        gradient = max(gradient, error)
        if entry.names[0].endswith("mlp.gate.weight"):
            router = max(router, float(got[own.start : own.stop].abs().max()))
    after = [float((want[f"after/{name}"] - tensor).abs().max()) for name, tensor in trained.export_weights()]
    loss = torch.tensor([result.loss, result.grad_norm])
    return {
        "logprobs": float((logprobs - want["logprobs"]).abs().max()),
        "loss": float((loss - want["loss"]).abs()[0]),
        "norm": float((loss - want["loss"]).abs()[1]),
        "gradient": gradient,
        "after": max(after, default=0.0),
        "router": router,
        "recorded": float(max(other, default=0.0)),
    }


class World:
    """A process group of its own for every backend: `with` joins it, and leaves it."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder, self.number = rank, size, folder, 0

    def __enter__(self) -> None:
        self.number += 1
        store = f"file://{self.folder}/store-{self.number}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=self.rank, world_size=self.size)

    def __exit__(self, *_: object) -> None:
        with cpu_shim.cpu_mode():
            dissolve()


def resume(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a checkpoint, two more; and the last two again from the checkpoint, in another layout."""

    def train(trained: Any, seeds: range) -> None:
        for seed in seeds:
            trained.train_step(make_rows(seed=seed, experts=tuple(case["experts"])), STEP)

    settings = {"adam_eps": 1e-5, "micro_batch_tokens": 60}
    folder = world.folder / f"checkpoint-{world.number}"
    with world:
        first = backend(Path(case["model"]), case["from"], **settings)
        train(first, range(2))
        first.save(folder)
        saved = first.digest()
        train(first, range(2, 4))
        wanted, digest = {name: tensor.clone() for name, tensor in first.export_weights()}, first.digest()
    with world:
        second = backend(Path(case["model"]), case["to"], **settings)
        second.load(folder)
        loaded = second.digest()
        train(second, range(2, 4))
        after = [float((wanted[name] - tensor).abs().max()) for name, tensor in second.export_weights()]
        same = second.digest() == digest
    return {
        "loaded": loaded == saved,
        "same": same,
        "after": max(after, default=0.0),
        "folder": str(folder),
        "digest": saved,
    }


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    cpu_shim.import_megatron()
    world, results = World(rank, size, folder), {}
    for case in json.loads((folder / "cases.json").read_text()):
        started = time.perf_counter()
        if "from" in case:
            results[case["name"]] = resume(world, case)
        else:
            with world:
                trained = build(case, case["parallel"])
                results[case["name"]] = compare(trained, case, load_file(case["reference"]))
        results[case["name"]]["seconds"] = time.perf_counter() - started
        (folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
