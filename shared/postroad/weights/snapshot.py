"""A frozen version in anonymous shared memory: it dies with its process, and a reader's mapping keeps it whole."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

import numpy as np
import xxhash

from postroad.weights.manifest import BUCKET_BYTES, TensorEntry, WeightsError, lay_out


class Snapshot:
    """One version's image in a memfd. Written once by `freeze`, never changed after that, so no read can be torn."""

    def __init__(self, run: str, version: int, entries: list[TensorEntry], size_bytes: int) -> None:
        self.version = version
        self.entries = entries
        self.size_bytes = size_bytes
        self.descriptor = os.memfd_create(memory_name(run, version), os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, max(size_bytes, 1))
        self._map = mmap.mmap(self.descriptor, max(size_bytes, 1))
        self.image = np.frombuffer(self._map, dtype=np.uint8)
        self.checksums: list[str] = []

    @classmethod
    def freeze(
        cls, run: str, version: int, tensors: Iterable[tuple[str, str, tuple[int, ...], np.ndarray]]
    ) -> Snapshot:
        """Copy (name, dtype, shape, contiguous bytes as uint8) into a new snapshot and checksum its buckets."""
        listed = list(tensors)
        entries, size_bytes = lay_out((name, dtype, shape) for name, dtype, shape, _ in listed)
        snapshot = cls(run, version, entries, size_bytes)
        for entry, (_, _, _, data) in zip(entries, listed, strict=True):
            if data.size != entry.size_bytes:
                raise WeightsError(f"{entry.name} has {data.size} bytes, its shape needs {entry.size_bytes}")
            snapshot.image[entry.offset : entry.offset + entry.size_bytes] = data
        snapshot.checksums = checksums(snapshot.image[:size_bytes])
        return snapshot

    def close(self) -> None:
        """Give the memory back as soon as the last reader lets go."""
        del self.image
        self._map.close()
        os.close(self.descriptor)


def memory_name(run: str, version: int) -> str:
    return f"postroad-{run}-v{version}"


def checksums(image: np.ndarray, bucket_bytes: int = BUCKET_BYTES) -> list[str]:
    """xxh3-128 of each bucket of `image`."""
    return [
        xxhash.xxh3_128_hexdigest(image[offset : offset + bucket_bytes].data)
        for offset in range(0, len(image), bucket_bytes)
    ]
