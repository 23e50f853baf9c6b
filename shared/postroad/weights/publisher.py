"""The trainer's side: publish a frozen version under compare-and-set, serve it, and release old ones."""

from __future__ import annotations

import os
import time

from postroad.bus import Bus
from postroad.store import Store, StoreConflict
from postroad.weights.manifest import DOCUMENT, Manifest, WeightsError
from postroad.weights.snapshot import Snapshot
from postroad.weights.transports import SnapshotServer, host_identity

KEPT_SNAPSHOTS = 2


class Publisher:
    """Publishes versions of one run. Versions only go up; two publishers can't publish the same one."""

    def __init__(self, bus: Bus, store: Store, key: str, *, host: str = "127.0.0.1", advertise: str = "") -> None:
        self._bus, self._store, self._host = bus, store, host
        self._address = advertise or host
        self._snapshots: dict[int, Snapshot] = {}
        self._server = SnapshotServer(self._snapshots.get, key)
        self._port = 0

    async def start(self) -> None:
        self._port = await self._server.start(self._host)

    async def close(self) -> None:
        await self._server.close()
        for snapshot in self._snapshots.values():
            snapshot.close()
        self._snapshots.clear()

    async def current(self) -> Manifest | None:
        _, value = await self._store.versioned(DOCUMENT)
        return None if value is None else Manifest.model_validate(value)

    async def publish(self, snapshot: Snapshot, digest: str) -> Manifest:
        """Make `snapshot` the run's current version. After a restart the same version may be published again, with the
        same digest and new endpoints. Raises WeightsError where a newer or a different one is published already."""
        current = await self.current()
        if current is not None and current.version > snapshot.version:
            raise WeightsError(f"version {snapshot.version} is older than the published {current.version}")
        if current is not None and current.version == snapshot.version and current.digest != digest:
            raise WeightsError(
                f"version {snapshot.version} was published with digest {current.digest}, not {digest}: "
                "retraining from the log did not repeat it"
            )
        manifest = Manifest(
            run=self._bus.subjects.run, version=snapshot.version, parent=current.version if current else None,
            digest=digest, size_bytes=snapshot.size_bytes, tensors=snapshot.entries, checksums=snapshot.checksums,
            endpoints=self._endpoints(snapshot), created=time.time(),
        )  # fmt: skip
        self._snapshots[snapshot.version] = snapshot
        expected = "" if current is None else str(current.version)
        try:
            await self._store.compare_and_set(
                DOCUMENT, expected, str(snapshot.version), manifest.model_dump(mode="json")
            )
        except StoreConflict as conflict:
            raise WeightsError(f"another publisher made version {conflict.found} meanwhile") from conflict
        await self._bus.announce(f"weights.{self._bus.subjects.run}", str(snapshot.version).encode())
        for version in sorted(self._snapshots)[:-KEPT_SNAPSHOTS]:
            self._snapshots.pop(version).close()
        return manifest

    def _endpoints(self, snapshot: Snapshot) -> list[dict[str, object]]:
        return [
            {
                "transport": "shared_memory",
                "host": host_identity(),
                "pid": os.getpid(),
                "descriptor": snapshot.descriptor,
            },
            {"transport": "tcp", "address": self._address, "port": self._port},
        ]
