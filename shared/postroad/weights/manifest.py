"""What a published version is: tensors in the Hugging Face layout, cut into buckets, and who holds which of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from postroad.weights.protocol import Stamp, WeightsError
from postroad.weights.slices import Box, check_cover, runs

ALIGNMENT_BYTES = 64
DOCUMENT = "weights"  # the manifest, in the store
READERS = "weights-reader"  # registries: who reads which version now,
RELAYS = "weights-relay"  # and which readers let others read what they have
ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1, "int32": 4, "int64": 8}


class TensorEntry(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_size(self) -> int:
        if self.dtype not in ITEM_SIZE:
            raise WeightsError(f"{self.name} has dtype {self.dtype}; known: {sorted(ITEM_SIZE)}")
        return ITEM_SIZE[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.item_size


class Delta(BaseModel):
    """How a bucket may be made from an earlier one, whose checksum is `base`: see deltas.py."""

    model_config = ConfigDict(frozen=True)
    base: str
    size_bytes: int
    checksum: str


class Bucket(BaseModel):
    """A box of a tensor, contiguous wherever it lies; `checksum` is the xxh3-128 of its bytes."""

    model_config = ConfigDict(frozen=True)
    tensor: int
    box: Box
    size_bytes: int
    checksum: str
    delta: Delta | None = None


class Source(BaseModel):
    """A process whose image holds buckets (`runs`: [first, stop) in the order of the image), and ways to read it."""

    model_config = ConfigDict(frozen=True)
    name: str
    runs: list[tuple[int, int]]
    endpoints: list[dict[str, Any]]
    deltas: bool = False  # the encoded deltas of its buckets follow them in the image

    def buckets(self) -> Iterable[int]:
        for first, stop in self.runs:
            yield from range(first, stop)


class Part(BaseModel):
    """What one trainer rank has frozen, numbered by itself."""

    model_config = ConfigDict(frozen=True)
    name: str
    tensors: list[TensorEntry]
    buckets: list[Bucket]
    endpoints: list[dict[str, Any]]


class Layout:
    """Where things lie in an image: one after another, aligned where a new tensor begins."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._last: object = None

    def add(self, tensor: object, size_bytes: int) -> int:
        """The offset of the next thing, which is part of `tensor`."""
        if tensor != self._last:
            self.size_bytes += -self.size_bytes % ALIGNMENT_BYTES
        self._last = tensor
        self.size_bytes += size_bytes
        return self.size_bytes - size_bytes


class Manifest(BaseModel):
    """`digest` names the parameters' content (the same function of them in every layout)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    run: str
    version: int
    epoch: int = 0
    parent: int | None
    digest: str
    size_bytes: int
    tensors: list[TensorEntry]
    buckets: list[Bucket] = Field(default_factory=list)
    sources: list[Source] = Field(default_factory=list)
    created: float = 0.0

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.version, self.epoch)

    def offsets(self, source: Source) -> tuple[dict[int, int], dict[int, int]]:
        """Where the buckets of `source` lie in its image, and where their deltas do."""
        layout = Layout()
        held = list(source.buckets())
        if held and max(held) >= len(self.buckets):
            raise WeightsError(
                f"{source.name} names bucket {max(held)}, version {self.version} has {len(self.buckets)}"
            )
        offsets = {n: layout.add(self.buckets[n].tensor, self.buckets[n].size_bytes) for n in held}
        deltas = {}
        for number in held if source.deltas else ():
            if (delta := self.buckets[number].delta) is not None:
                deltas[number] = layout.add(("delta", number), delta.size_bytes)
        return offsets, deltas


def merge(parts: Sequence[Part]) -> tuple[list[TensorEntry], list[Bucket], list[Source]]:
    """One numbering of what the ranks hold. Raises WeightsError where a tensor is incomplete, ranks disagree on it, or
    replicas hold different bytes."""
    tensors: dict[str, tuple[int, TensorEntry]] = {}
    numbers: dict[tuple[int, Box], int] = {}
    buckets: list[Bucket] = []
    sources = []
    for part in parts:
        for entry in part.tensors:
            _, known = tensors.setdefault(entry.name, (len(tensors), entry))
            if known != entry:
                raise WeightsError(
                    f"{entry.name} is {entry.dtype} {entry.shape} on {part.name}, elsewhere {known.shape}"
                )
        held = []
        for bucket in part.buckets:
            tensor = tensors[part.tensors[bucket.tensor].name][0]
            number = numbers.setdefault((tensor, bucket.box), len(buckets))
            if number == len(buckets):
                buckets.append(bucket.model_copy(update={"tensor": tensor}))
            elif buckets[number].checksum != bucket.checksum:
                name = part.tensors[bucket.tensor].name
                raise WeightsError(f"{part.name} holds other bytes of {name} {bucket.box} than the ranks before it")
            held.append(number)
        deltas = any(bucket.delta for bucket in part.buckets)
        sources.append(Source(name=part.name, runs=runs(held), endpoints=part.endpoints, deltas=deltas))
    boxes: dict[int, list[Box]] = {}
    for tensor, box in numbers:
        boxes.setdefault(tensor, []).append(box)
    for index, entry in tensors.values():
        check_cover(entry.name, entry.shape, boxes.get(index, []))
    return [entry for _, entry in tensors.values()], buckets, sources
