"""Exact save and load of one rank: parameters, float32 masters, Adam moments and steps, random generators.

A checkpoint folder holds rank-00000.safetensors and rank-00000.json per rank. The JSON has a checksum per tensor and
what the state belongs to. The folder appears whole, by a rename, or not at all.
"""

from __future__ import annotations

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

from postroad_trainer.backend.parallel import DataParallel
from postroad_trainer.backend.settings import BackendError

FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint can be loaded into."""

    architecture: str
    dtype: str
    world_size: int
    parameters: int
    frozen: int


class State:
    """The live tensors of a rank by name. Parameters that have a float32 master are kept as the master alone."""

    def __init__(self, model: torch.nn.Module, optimizers: list[Any]) -> None:
        self._parameters = dict(model.named_parameters())
        self._moments = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                self._moments |= {id(parameter): optimizer.state for parameter in group["params"]}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor to be saved; those that no step has made yet are left out."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            trained = self._trained(parameter)
            found[("parameter/" if trained is parameter else "master/") + name] = trained.detach()
            state = self._moments.get(id(trained), {}).get(trained, {})
            found |= {f"{moment}/{name}": state[moment] for moment in MOMENTS if moment in state}
        return found

    @staticmethod
    def _trained(parameter: torch.nn.Parameter) -> torch.Tensor:
        return getattr(parameter, "main_param", parameter)

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Puts saved tensors in place; optimizer state that was not saved is dropped."""
        for name, parameter in self._parameters.items():
            trained = self._trained(parameter)
            saved = tensors[("parameter/" if trained is parameter else "master/") + name]
            trained.copy_(saved)
            if trained is not parameter:
                parameter.copy_(saved)
            optimizer_state = self._moments.get(id(trained))
            if optimizer_state is None:
                continue
            optimizer_state.pop(trained, None)
            moments = {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS if f"{moment}/{name}" in tensors}
            if moments:
                # copied: what was read is mapped from the file, which may be deleted or cut later
                optimizer_state[trained] = {key: value.to(trained.device, copy=True) for key, value in moments.items()}

    def identity(self, architecture: str, dtype: str, world_size: int) -> Identity:
        values = self._parameters.values()
        return Identity(
            architecture,
            dtype,
            world_size,
            sum(parameter.numel() for parameter in values),
            sum(parameter.numel() for parameter in values if not parameter.requires_grad),
        )


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


def save(folder: Path, state: State, identity: Identity, ranks: DataParallel) -> None:
    """Writes this rank's part; when all ranks have, the folder takes its name. Called on all ranks."""
    if folder.exists():
        raise BackendError(f"{folder} exists already; a checkpoint never overwrites another")
    temporary = folder.with_name(folder.name + ".writing")
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    tensors = {name: tensor.contiguous() for name, tensor in {**state.tensors(), **random_tensors()}.items()}
    stem = f"rank-{ranks.rank:05d}"
    save_file(tensors, temporary / f"{stem}.safetensors")
    description = {
        "format": FORMAT,
        **asdict(identity),
        "rank": ranks.rank,
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


def load(folder: Path, state: State, identity: Identity, ranks: DataParallel) -> None:
    """Restores this rank, after everything has been checked. Raises BackendError and leaves the state as it was."""
    stem = f"rank-{ranks.rank:05d}"
    description = _description(folder / f"{stem}.json")
    for key, own in asdict(identity).items():
        if description.get(key) != own:
            raise BackendError(
                f"{folder}: the checkpoint's {key} is {description.get(key)!r}, this trainer's is {own!r}; "
                "load it into a trainer of the same model and sizes"
            )
    tensors = _verified(folder / f"{stem}.safetensors", description["checksums"])
    state.restore(tensors)
    restore_random(tensors)


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BackendError(f"{path} does not exist; the folder is no checkpoint of this rank")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise BackendError(f"{path} is damaged or cut short ({error})") from error
    if description.get("format") != FORMAT:
        raise BackendError(f"{path} has format {description.get('format')}; this trainer reads format {FORMAT}")
    return dict(description)


def _verified(path: Path, checksums: dict[str, str]) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise BackendError(f"{path} does not exist; the checkpoint is not whole")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise BackendError(f"{path} is damaged or cut short ({error}); use an older checkpoint") from error
    if set(tensors) != set(checksums):
        raise BackendError(f"{path} and its JSON name different tensors; use an older checkpoint")
    for name, tensor in tensors.items():
        if _checksum(tensor) != checksums[name]:
            raise BackendError(
                f"{path}: {name} does not have its checksum; the file is damaged, use an older checkpoint"
            )
    return tensors
