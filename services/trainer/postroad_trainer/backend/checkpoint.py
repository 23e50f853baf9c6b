"""Exact save and load: parameters, float32 masters, Adam moments and random generators, under any layout of ranks.

A checkpoint folder holds rank-00000.safetensors and rank-00000.json per rank that wrote it. Every piece of a Hugging
Face tensor is in one of the files; the JSON has its place, its checksum and what the state belongs to. So a checkpoint
is loaded by any number of ranks in any layout. The folder appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from postroad_trainer.backend.parallel import Ranks
from postroad_trainer.backend.settings import BackendError
from postroad_trainer.backend.state import State
from postroad_trainer.models.family import Entry, Piece

FORMAT = 2


@dataclass(frozen=True)
class Identity:
    """What a checkpoint can be loaded into. layout: only an equal one gets the random generators back."""

    architecture: str
    dtype: str
    parameters: int
    frozen: int
    layout: dict[str, Any]


def random_tensors() -> dict[str, torch.Tensor]:
    """torch's generators (without CUDA the second is the first) and megatron's named ones."""
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "random/torch": torch.get_rng_state(),
        "random/device": torch.cuda.get_rng_state(),
        **{f"random/tracker/{name}": state for name, state in tracker.items()},
    }


def restore_random(tensors: dict[str, torch.Tensor]) -> None:
    from megatron.core import tensor_parallel

    torch.cuda.set_rng_state(tensors["random/device"])
    torch.set_rng_state(tensors["random/torch"])
    head = "random/tracker/"
    states = {name.removeprefix(head): state for name, state in tensors.items() if name.startswith(head)}
    tensor_parallel.get_cuda_rng_tracker().set_states(states)


def _checksum(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, state: State, identity: Identity, ranks: Ranks) -> None:
    """Writes this rank's part; when all ranks have, the folder takes its name. Called on all ranks."""
    if folder.exists():
        raise BackendError(f"{folder} exists already; a checkpoint never overwrites another")
    temporary = folder.with_name(folder.name + ".writing")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    step = ranks.most(state.step)
    tensors, places = dict(random_tensors()), {}
    for name, place, tensor in state.pieces(step):
        key = f"{name}@{place[1]}"
        tensors[key], places[key] = tensor.cpu(), place
    stem = f"rank-{ranks.rank:05d}"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / f"{stem}.safetensors")
    description = {
        "format": FORMAT,
        **asdict(identity),
        "rank": ranks.rank,
        "ranks": ranks.world,
        "step": step,
        "places": places,
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    (temporary / f"{stem}.json").write_text(json.dumps(description, indent=1))
    for part in (f"{stem}.safetensors", f"{stem}.json"):
        _sync(temporary / part)
    ranks.barrier()
    if ranks.rank == 0:
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    ranks.barrier()


def load(folder: Path, state: State, identity: Identity, ranks: Ranks) -> None:
    """Restores this rank, after everything has been checked. Raises BackendError on all ranks, their state unchanged."""
    error = None
    try:
        descriptions = _descriptions(folder, identity)
        for description in descriptions[ranks.rank :: ranks.world]:
            _verify(folder / f"rank-{description['rank']:05d}.safetensors", description["checksums"])
    except BackendError as caught:
        error = caught
    if ranks.most(error is not None):
        raise error or BackendError(f"{folder}: another rank could not read its part; its log says why")
    with _Pieces(folder, descriptions) as saved:
        state.restore(
            lambda kind, entry: state.mapping.join(entry, saved.parts(kind, entry, state)), descriptions[0]["step"]
        )
        if descriptions[0]["layout"] == identity.layout:
            restore_random(saved.random(ranks.rank))


def _descriptions(folder: Path, identity: Identity) -> list[dict[str, Any]]:
    first = _description(folder / "rank-00000.json")
    for key in ("architecture", "dtype", "parameters", "frozen"):
        if first.get(key) != getattr(identity, key):
            raise BackendError(
                f"{folder}: the checkpoint's {key} is {first.get(key)!r}, this trainer's is {getattr(identity, key)!r}; "
                "load it into a trainer of the same model"
            )
    return [first, *(_description(folder / f"rank-{rank:05d}.json") for rank in range(1, first["ranks"]))]


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BackendError(f"{path} does not exist; the folder is no checkpoint, or not whole")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise BackendError(f"{path} is damaged or cut short ({error})") from error
    if description.get("format") != FORMAT:
        raise BackendError(f"{path} has format {description.get('format')}; this trainer reads format {FORMAT}")
    return dict(description)


def _verify(path: Path, checksums: dict[str, str]) -> None:
    if not path.is_file():
        raise BackendError(f"{path} does not exist; the checkpoint is not whole")
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(checksums):
                raise BackendError(f"{path} and its JSON name different tensors; use an older checkpoint")
            for name, checksum in checksums.items():
                if _checksum(file.get_tensor(name)) != checksum:
                    raise BackendError(
                        f"{path}: {name} does not have its checksum; the file is damaged, use an older checkpoint"
                    )
    except SafetensorError as error:
        raise BackendError(f"{path} is damaged or cut short ({error}); use an older checkpoint") from error


class _Pieces:
    """The tensors of a verified checkpoint, read piece by piece."""

    def __init__(self, folder: Path, descriptions: list[dict[str, Any]]) -> None:
        self._stack = contextlib.ExitStack()
        self._files = [
            self._stack.enter_context(safe_open(folder / f"rank-{description['rank']:05d}.safetensors", "pt"))
            for description in descriptions
        ]
        self._places: dict[str, list[tuple[int, str, list[int]]]] = {}
        for rank, description in enumerate(descriptions):
            for key, place in description["places"].items():
                self._places.setdefault(key.rpartition("@")[0], []).append((rank, key, place))

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def parts(self, kind: str, entry: Entry, state: State) -> list[torch.Tensor]:
        return [self._part(f"{kind}/{piece.name}", piece) for piece in state.mapping.pieces(entry)]

    def _part(self, name: str, piece: Piece) -> torch.Tensor:
        if name not in self._places:
            raise BackendError(f"the checkpoint holds no {name}; it is of another model")
        saved = sorted(self._places[name], key=lambda found: found[2][1])
        dim, start, stop = piece.dim, piece.start, piece.start + piece.length
        if piece.length == piece.full and len(saved) > 1:  # all of it, whichever way it was split
            dim, start, stop = saved[0][2][0], 0, saved[0][2][3]
        found = []
        for rank, key, (_, first, length, _) in saved:
            low, high = (
                (start, stop) if len(saved) == 1 else (max(start, first) - first, min(stop, first + length) - first)
            )
            if low < high:
                part = slice(low, high)
                tensor = self._files[rank].get_slice(key)
                found.append(tensor[part] if dim == 0 else tensor[:, part])
        return torch.cat(found, dim) if len(found) > 1 else found[0]

    def random(self, rank: int) -> dict[str, torch.Tensor]:
        file = self._files[rank]
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("random/")}  # noqa: SIM118
