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
from postroad_trainer.models.family import Entry, Family, Mapping, Piece


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

    def read(self, piece: Piece, shape: torch.Size) -> torch.Tensor:
        """The piece, which must have this shape. Raises ModelError when the folder lacks it, has it in another shape
        or its file is damaged."""
        if piece.name not in self._files:
            raise ModelError(f"{self._path} has no tensor {piece.name}; config.json and weights are not of one model")
        wanted = [*shape]
        wanted[piece.dim] = piece.full
        file = self._files[piece.name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
            tensor = self._open[file].get_slice(piece.name)
            if tensor.get_shape() != wanted:
                raise ModelError(
                    f"{self._path}: {piece.name} has shape {tensor.get_shape()}; config.json asks for {wanted}"
                )
            part = slice(piece.start, piece.start + piece.length)
            return tensor[part] if piece.dim == 0 else tensor[:, part]
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{file}: missing, damaged or cut short ({error})") from error


@torch.no_grad()
def load_weights(chunks: list[Any], family: Family, mapping: Mapping, model_path: Path) -> None:
    """Fills every parameter of the chunks, reading the parts that this rank holds and no more.

    Raises ModelError for missing or misshapen tensors.
    """
    filled: set[int] = set()
    with ModelFolder(model_path) as folder:
        for entry in entries_of(chunks, family):
            parts = mapping.split(entry, entry.parameter.detach())
            read = [folder.read(piece, part.shape) for piece, part in zip(mapping.pieces(entry), parts, strict=True)]
            entry.parameter.data.copy_(mapping.join(entry, read))
            filled.add(id(entry.parameter))
    missing = [name for chunk in chunks for name, value in chunk.named_parameters() if id(value) not in filled]
    if missing:
        raise ModelError(f"{family.architecture}'s mapping leaves {len(missing)} parameters unfilled: {missing[:3]}")


def entries_of(chunks: list[Any], family: Family) -> Iterator[Entry]:
    """The entries of all model chunks of this rank."""
    for chunk in chunks:
        yield from family.entries(chunk)


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
