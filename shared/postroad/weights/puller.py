"""The engine's side: read a version bucket by bucket, verify each, and hand out tensors only when all are right."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

import numpy as np
import xxhash

from postroad.store import Store
from postroad.weights.manifest import DOCUMENT, Manifest, TensorEntry, WeightsError
from postroad.weights.transports import PREFERENCE, READERS, Reader

logger = logging.getLogger(__name__)


class Puller:
    """Keeps one staging image, reused from version to version. One pull at a time."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._image = np.empty(0, dtype=np.uint8)

    async def current(self) -> Manifest | None:
        """The newest published version, or None."""
        _, value = await self._store.versioned(DOCUMENT)
        return None if value is None else Manifest.model_validate(value)

    async def pull(self, manifest: Manifest, *, deadline_s: float) -> str:
        """Read and verify `manifest`'s image into staging; the transport that gave it. Raises WeightsError where no
        endpoint gave a verified image within `deadline_s`; nothing is handed out then."""
        faults = []
        endpoints = [e for name in PREFERENCE for e in manifest.endpoints if e["transport"] == name]
        end = time.monotonic() + deadline_s
        for endpoint in endpoints:
            try:
                await asyncio.to_thread(self._read, manifest, endpoint, end)
                return str(endpoint["transport"])
            except (OSError, WeightsError) as error:
                faults.append(f"{endpoint['transport']}: {error}")
        raise WeightsError(f"version {manifest.version} could not be read: {'; '.join(faults) or 'no endpoint'}")

    def _read(self, manifest: Manifest, endpoint: dict[str, object], end: float) -> None:
        if self._image.size < manifest.size_bytes:
            self._image = np.empty(manifest.size_bytes, dtype=np.uint8)
        reader: Reader = READERS[str(endpoint["transport"])](endpoint, manifest, self._key)
        try:
            for number, checksum in enumerate(manifest.checksums):
                if time.monotonic() > end:
                    raise WeightsError(f"deadline passed at bucket {number} of {len(manifest.checksums)}")
                offset, size = manifest.bucket(number)
                target = self._image[offset : offset + size]
                reader.read(offset, target)
                if xxhash.xxh3_128_hexdigest(target.data) != checksum:
                    raise WeightsError(f"bucket {number} does not have its checksum")
        finally:
            reader.close()

    def tensors(self, manifest: Manifest) -> Iterator[tuple[TensorEntry, np.ndarray]]:
        """The staged tensors as uint8 views, valid until the next pull."""
        for entry in manifest.tensors:
            yield entry, self._image[entry.offset : entry.offset + entry.size_bytes]
