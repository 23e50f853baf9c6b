"""Weights between a Hugging Face folder and a built model, one tensor at a time, and their digest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from postroad_trainer.models.configuration import ModelError
from postroad_trainer.models.family import Entry, Family, from_megatron, to_megatron


def _files_by_name(model_path: Path) -> dict[str, Path]:
    """Tensor name to file, from the index of a sharded model or from the only file."""
    index = model_path / "model.safetensors.index.json"
    if index.is_file():
        return {name: model_path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = model_path / "model.safetensors"
    if not single.is_file():
        raise ModelError(f"{model_path} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, "pt") as file:
        return {name: single for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


class ModelFolder:
    """Reads single tensors of a model folder. Use as a context manager."""

    def __init__(self, model_path: Path) -> None:
        self._path = model_path
        self._open: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._files = _files_by_name(model_path)
        except SafetensorError as error:
            raise ModelError(f"{model_path}: the safetensors file is damaged or cut short ({error})") from error

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name. Raises ModelError when the folder lacks it or its file is damaged."""
        if name not in self._files:
            raise ModelError(f"{self._path} has no tensor {name}; config.json and weights are not of one model")
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
            return self._open[file].get_tensor(name)
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{file}: missing, damaged or cut short ({error})") from error


@torch.no_grad()
def load_weights(model: Any, family: Family, model_path: Path) -> None:
    """Fills every parameter of the model from the folder. Raises ModelError for missing or misshapen tensors."""
    filled: set[int] = set()
    with ModelFolder(model_path) as folder:
        for entry in family.entries(model):
            tensors = [folder.tensor(name) for name in entry.names]
            value = to_megatron(entry, tensors, model.config.num_query_groups, model.config.kv_channels)
            if value.shape != entry.parameter.shape:
                raise ModelError(
                    f"{model_path}: {', '.join(entry.names)} give shape {tuple(value.shape)}; "
                    f"config.json asks for {tuple(entry.parameter.shape)}"
                )
            entry.parameter.data.copy_(value)
            filled.add(id(entry.parameter))
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in filled]
    if missing:
        raise ModelError(f"{family.architecture}'s mapping leaves {len(missing)} parameters unfilled: {missing[:3]}")


def exported(model: Any, entries: Iterable[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, contiguous tensor) of each parameter. Plain tensors may alias the live parameter."""
    for entry in entries:
        parts = from_megatron(entry, entry.parameter.detach(), model.config.num_query_groups, model.config.kv_channels)
        yield from zip(entry.names, parts, strict=True)


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3_128 (hex) over name, dtype, shape and xxh3_128 of the bytes of each tensor, in the order of the names.

    Depends on the weights alone, not on the order in which they come or on how a trainer lays them out.
    """
    parts: dict[str, bytes] = {}
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
        head = f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode()
        parts[name] = head + xxhash.xxh3_128_digest(raw)
    return xxhash.xxh3_128_hexdigest(b"\n".join(parts[name] for name in sorted(parts)))
