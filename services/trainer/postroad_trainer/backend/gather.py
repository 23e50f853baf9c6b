"""Whole Hugging Face tensors from the pieces that the ranks hold, one tensor at a time, on rank 0."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from postroad_trainer.backend.parallel import Ranks
from postroad_trainer.models.family import Entry, Mapping


@dataclass(frozen=True)
class _Held:
    """A piece of a tensor, on the first rank that holds it."""

    rank: int
    dim: int
    start: int
    shape: tuple[int, ...]
    dtype: str


class Gatherer:
    """Knows which rank holds what. Built, and iterated, by all ranks together."""

    def __init__(self, entries: Iterable[Entry], mapping: Mapping, ranks: Ranks) -> None:
        self._mapping, self._rank = mapping, ranks.rank
        self._own: dict[tuple[str, int], tuple[Entry, int]] = {}
        described: list[Any] = []
        for entry in entries:
            parts = [] if entry.copy else mapping.split(entry, entry.parameter.detach())
            for number, (piece, part) in enumerate(zip(mapping.pieces(entry) if parts else [], parts, strict=True)):
                self._own[piece.name, piece.start] = (entry, number)
                dtype = str(part.dtype).removeprefix("torch.")
                described.append([piece.name, piece.dim, piece.start, list(part.shape), dtype])
        self._holders: dict[str, dict[int, _Held]] = {}
        for rank, told in enumerate(ranks.tell_all(json.dumps(described).encode())):
            for name, dim, start, shape, dtype in json.loads(told):
                held = _Held(rank, dim, start, tuple(shape), dtype)
                self._holders.setdefault(name, {}).setdefault(start, held)

    def elements(self, name: str | None = None) -> int:
        """How many numbers a tensor, or the whole model, has."""
        names = self._holders if name is None else [name]
        return sum(math.prod(held.shape) for name in names for held in self._holders[name].values())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), layer by layer, on rank 0; nothing on the others, which must iterate too.

        A tensor that rank 0 holds whole may alias the live parameter.
        """
        for name in sorted(self._holders, key=_natural):
            pieces = sorted(self._holders[name].values(), key=lambda held: held.start)
            if self._rank == 0:
                parts = [self._part(name, held) if held.rank == 0 else self._received(held) for held in pieces]
                yield name, parts[0] if len(parts) == 1 else torch.cat(parts, pieces[0].dim)
                continue
            for held in pieces:
                if held.rank == self._rank:
                    dist.send(self._part(name, held).reshape(-1).view(torch.uint8), 0)

    def _part(self, name: str, held: _Held) -> torch.Tensor:
        entry, number = self._own[name, held.start]
        return self._mapping.split(entry, entry.parameter.detach())[number]

    def _received(self, held: _Held) -> torch.Tensor:
        device = next(iter(self._own.values()))[0].parameter.device
        tensor = torch.empty(held.shape, dtype=getattr(torch, held.dtype), device=device)
        dist.recv(tensor.reshape(-1).view(torch.uint8), held.rank)
        return tensor


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
