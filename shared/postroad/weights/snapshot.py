"""A frozen version in anonymous shared memory: it dies with its process, and a reader's mapping keeps it whole."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import xxhash

from postroad.weights import deltas
from postroad.weights.manifest import Bucket, Delta, Layout, Part, TensorEntry
from postroad.weights.protocol import WeightsError
from postroad.weights.slices import Box, Shape, cells, shape_of, whole, within

Cuts = Callable[[str, Shape], tuple[int, ...]]


class Shard(NamedTuple):
    """The `box` of a tensor of `shape` that this rank holds; `data` are its bytes (uint8, row-major)."""

    name: str
    dtype: str
    shape: Shape
    box: Box
    data: np.ndarray


def checksum(data: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(data.data)


class Image:
    """Memory that other processes can open: by its descriptor, or through /proc by whoever may trace this process."""

    def __init__(self, name: str, size_bytes: int = 0, descriptor: int | None = None) -> None:
        self.name = name
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC) if descriptor is None else descriptor
        self.size_bytes = size_bytes
        os.ftruncate(self.descriptor, max(size_bytes, 1))
        self._map = mmap.mmap(self.descriptor, max(size_bytes, 1))
        self._map.madvise(mmap.MADV_HUGEPAGE)  # where the kernel has them for shared memory: faster to pin and to copy
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)[:size_bytes]

    def close(self) -> None:
        """Give the memory back as soon as the last reader lets go."""
        del self.bytes
        os.close(self.descriptor)
        with contextlib.suppress(BufferError):  # a view of it lives: it goes with the last one
            self._map.close()


class Snapshot:
    """One version of what one rank holds. Written once by `freeze`, never changed after that: no read can be torn."""

    def __init__(self, run: str, version: int) -> None:
        self.version = version
        self.entries: list[TensorEntry] = []
        self.buckets: list[Bucket] = []
        self.offsets: list[int] = []
        self._layout = Layout()
        self._name = f"postroad-{run}-v{version}"
        self._descriptor = os.memfd_create(self._name, os.MFD_CLOEXEC)
        self._image: Image | None = None

    @classmethod
    def freeze(cls, run: str, version: int, tensors: Iterable[tuple[str, str, Shape, np.ndarray]]) -> Snapshot:
        """Copy whole tensors (name, dtype, shape, contiguous bytes as uint8) into a new snapshot."""
        return cls.freeze_shards(run, version, (Shard(n, d, tuple(s), whole(s), data) for n, d, s, data in tensors))

    @classmethod
    def freeze_shards(cls, run: str, version: int, shards: Iterable[Shard], cuts: Cuts | None = None) -> Snapshot:
        """Copy shards, one at a time as they come, and checksum their buckets on the way. `cuts` says into how many
        parts engines split a tensor along each dimension, so that each of theirs is a set of whole buckets."""
        snapshot = cls(run, version)
        try:
            for shard in shards:
                snapshot._add(shard, cuts(shard.name, shard.shape) if cuts else ())
        except BaseException:
            os.close(snapshot._descriptor)
            raise
        snapshot._image = Image(snapshot._name, snapshot._layout.size_bytes, snapshot._descriptor)
        return snapshot

    def _add(self, shard: Shard, cuts: tuple[int, ...]) -> None:
        entry = TensorEntry(name=shard.name, dtype=shard.dtype, shape=shard.shape)
        local = shape_of(shard.box)
        expected = entry.model_copy(update={"shape": local}).size_bytes
        if shard.data.size != expected:
            raise WeightsError(f"{entry.name} has {shard.data.size} bytes, its shape {local} needs {expected}")
        if self.entries[-1:] != [entry]:  # otherwise another box of the same tensor
            self.entries.append(entry)
        index = len(self.entries) - 1
        array = shard.data.reshape(*local, entry.item_size)
        for box in cells(shard.box, shard.shape, cuts, entry.item_size):
            data = np.ascontiguousarray(array[within(box, shard.box)]).reshape(-1)
            offset = self._layout.add(index, data.size)
            _write(self._descriptor, offset, data)
            self.buckets.append(Bucket(tensor=index, box=box, size_bytes=data.size, checksum=checksum(data)))
            self.offsets.append(offset)

    def add_deltas(self, base: Snapshot) -> None:
        """Put after the buckets what changed in them since `base`, where that is small."""
        places = {(base.entries[b.tensor].name, b.box): n for n, b in enumerate(base.buckets)}
        for number, bucket in enumerate(self.buckets):
            place = places.get((self.entries[bucket.tensor].name, bucket.box))
            if place is None or base.buckets[place].size_bytes != bucket.size_bytes:
                continue
            if base.buckets[place].checksum == bucket.checksum:
                continue
            blob = deltas.encode(self.bucket(number), base.bucket(place))
            if blob is not None:
                data = np.frombuffer(blob, dtype=np.uint8)
                _write(self._descriptor, self._layout.add(("delta", number), data.size), data)
                delta = Delta(base=base.buckets[place].checksum, size_bytes=data.size, checksum=checksum(data))
                self.buckets[number] = bucket.model_copy(update={"delta": delta})
        self.image.size_bytes = self._layout.size_bytes

    @property
    def image(self) -> Image:
        if self._image is None:
            raise WeightsError(f"snapshot {self.version} is closed")
        return self._image

    @property
    def size_bytes(self) -> int:
        """Bytes of the image, deltas included."""
        return self._layout.size_bytes

    def bucket(self, number: int) -> np.ndarray:
        offset = self.offsets[number]
        return self.image.bytes[offset : offset + self.buckets[number].size_bytes]

    def tensors(self) -> Iterator[tuple[TensorEntry, np.ndarray]]:
        """Whole tensors (entry, bytes) of a snapshot that was frozen from whole ones."""
        starts: dict[int, int] = {}
        for bucket, offset in zip(self.buckets, self.offsets, strict=True):
            starts.setdefault(bucket.tensor, offset)
        for index, entry in enumerate(self.entries):
            start = starts.get(index, 0)
            yield entry, self.image.bytes[start : start + entry.size_bytes]

    def part(self, name: str, endpoints: list[dict[str, Any]]) -> Part:
        return Part(name=name, tensors=self.entries, buckets=self.buckets, endpoints=endpoints)

    def close(self) -> None:
        if self._image is not None:
            self._image.close()
            self._image = None


def _write(descriptor: int, offset: int, data: np.ndarray) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(descriptor, data[done:].data, offset + done)
