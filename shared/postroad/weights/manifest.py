"""What a published version is: tensors in the Hugging Face layout, one contiguous image, a checksum per bucket."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from postroad.weights.protocol import WeightsError

BUCKET_BYTES = 16 * 1024 * 1024
ALIGNMENT_BYTES = 64
DOCUMENT = "weights"
ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1, "int32": 4, "int64": 8}


class TensorEntry(BaseModel):
    """A tensor's place in the image."""

    model_config = ConfigDict(frozen=True)
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Manifest(BaseModel):
    """`digest` names the parameters' content (the same function of them in every layout); `checksums` are xxh3-128 of
    each bucket of BUCKET_BYTES of the image; `endpoints` say where it can be read, each with its transport."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    run: str
    version: int
    parent: int | None
    digest: str
    size_bytes: int
    bucket_bytes: int = BUCKET_BYTES
    tensors: list[TensorEntry]
    checksums: list[str]
    endpoints: list[dict[str, Any]] = Field(default_factory=list)
    created: float = 0.0

    def bucket(self, number: int) -> tuple[int, int]:
        """(offset, size) of a bucket of the image, in bytes."""
        offset = number * self.bucket_bytes
        return offset, min(self.bucket_bytes, self.size_bytes - offset)


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[list[TensorEntry], int]:
    """Place (name, dtype, shape) one after another, aligned; the entries and the size of the image in bytes."""
    entries, offset = [], 0
    for name, dtype, shape in tensors:
        if dtype not in ITEM_SIZE:
            raise WeightsError(f"{name} has dtype {dtype}; known: {sorted(ITEM_SIZE)}")
        size = ITEM_SIZE[dtype]
        for side in shape:
            size *= side
        entries.append(TensorEntry(name=name, dtype=dtype, shape=tuple(shape), offset=offset, size_bytes=size))
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    if len({entry.name for entry in entries}) != len(entries):
        raise WeightsError("two tensors have the same name")
    return entries, offset
