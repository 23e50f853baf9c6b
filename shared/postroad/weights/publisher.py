"""The trainer's side: publish a frozen version under compare-and-set, let others read it, and release old ones."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from postroad.bus import Bus
from postroad.store import Lease, LeaseLost, Store, StoreConflict, StoreError
from postroad.weights.manifest import DOCUMENT, READERS, Manifest, Part, merge
from postroad.weights.nixl import NixlProcess
from postroad.weights.protocol import LEASE_S, Shelf, Stamp, WeightsError, check_publication
from postroad.weights.server import ImageServer
from postroad.weights.snapshot import Image, Snapshot
from postroad.weights.transports import SharedMemoryReader, write_folder

logger = logging.getLogger(__name__)

ROOM_S = 30.0  # how long a slow reader may keep a superseded snapshot from giving room to the next
POLL_S = 0.05
LEASE = "weights.publisher"
TRANSPORTS = ("shared_memory", "tcp")


class Holder:
    """One rank's snapshots, and the ways to read them: `transports`, and a folder where there is one."""

    def __init__(
        self, key: str, *, name: str = "trainer", transports: Sequence[str] = TRANSPORTS, folder: Path | None = None
    ) -> None:
        self.name, self._transports, self._folder = name, transports, folder
        self.snapshots: dict[int, Snapshot] = {}
        self._server = ImageServer(self._find, key)
        self._nixl = NixlProcess()

    def _find(self, version: int) -> Image | None:
        snapshot = self.snapshots.get(version)
        return None if snapshot is None else snapshot.image

    async def start(self, host: str, advertise: str = "") -> None:
        await self._server.start(host, advertise)

    async def hold(self, snapshot: Snapshot) -> Part:
        """Keep `snapshot` in place of another of its version; what it has and where it can be read."""
        await self.release(snapshot.version)
        self.snapshots[snapshot.version] = snapshot
        endpoints = []
        if "shared_memory" in self._transports:
            endpoints.append(SharedMemoryReader.endpoint_of(snapshot.image))
        if "tcp" in self._transports:
            endpoints.append(self._server.endpoint())
        if "nixl" in self._transports:
            try:
                registered = await asyncio.to_thread(self._nixl.register, snapshot.image)
                endpoints.append({"transport": "nixl", **registered})
            except (WeightsError, OSError) as error:
                logger.warning("version %d is not offered over NIXL: %s", snapshot.version, error)
        if self._folder is not None:
            path = self._folder / f"v{snapshot.version}" / "model.safetensors"
            tensors = [(entry.name, entry.dtype, entry.shape, data) for entry, data in snapshot.tensors()]
            await asyncio.to_thread(write_folder, path, tensors)
            endpoints.append({"transport": "folder", "path": str(path)})
        return snapshot.part(self.name, endpoints)

    async def release(self, version: int) -> None:
        if (snapshot := self.snapshots.pop(version, None)) is None:
            return
        try:
            await asyncio.to_thread(self._nixl.release, snapshot.image.name)
        except (WeightsError, OSError) as error:
            logger.warning("NIXL did not release version %d: %s", version, error)
        snapshot.close()
        if self._folder is not None:
            shutil.rmtree(self._folder / f"v{version}", ignore_errors=True)

    async def close(self) -> None:
        await self._server.close()
        self._nixl.close()
        for version in list(self.snapshots):
            await self.release(version)


class Publisher:
    """Publishes versions of one run. Versions only go up, and one publisher at a time may say what they are."""

    def __init__(
        self, bus: Bus, store: Store, key: str, *, host: str = "127.0.0.1", advertise: str = "",
        transports: Sequence[str] = TRANSPORTS, folder: Path | None = None,
    ) -> None:  # fmt: skip
        self._bus, self._store, self._host, self._advertise = bus, store, host, advertise
        self._holder = Holder(key, transports=transports, folder=folder)
        self._shelf = Shelf()
        self._identity = uuid.uuid4().hex
        self._lease: Lease | None = None
        self._lost = ""
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take the run's lease, waiting for that of a dead predecessor to end. Raises WeightsError while another lives."""
        end = time.monotonic() + 2 * LEASE_S
        while self._lease is None:
            try:
                self._lease = await self._store.acquire(LEASE, self._identity, LEASE_S)
            except LeaseLost as error:
                if time.monotonic() > end:
                    raise WeightsError("another publisher of this run is alive: two can't share it") from error
                await asyncio.sleep(POLL_S)
        self._renewing = asyncio.create_task(self._renew())
        await self._holder.start(self._host, self._advertise)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        await self._holder.close()
        if self._lease is not None and not self._lost:
            await self._store.release(self._lease)

    async def _renew(self) -> None:
        while not self._lost:
            await asyncio.sleep(LEASE_S / 3)
            try:
                self._lease = await self._store.acquire(LEASE, self._identity, LEASE_S)
                await self._release_idle()
            except LeaseLost:
                self._lost = "another publisher took over this run's weights"
                logger.error(self._lost)
            except StoreError as error:
                logger.warning("the publisher's lease could not be renewed: %s", error)

    async def current(self) -> Manifest | None:
        _, value = await self._store.versioned(DOCUMENT)
        return None if value is None else Manifest.model_validate(value)

    async def make_room(self) -> None:
        """Wait until one more snapshot may be frozen: for live readers of a superseded one, at most ROOM_S."""
        end = time.monotonic() + ROOM_S
        while not self._shelf.has_room():
            await self._release_idle()
            if not self._shelf.has_room() and time.monotonic() > end:
                for version in self._shelf.surplus():
                    logger.warning("version %d is released under its readers after %.0f s", version, ROOM_S)
                    await self._release(version)
            elif not self._shelf.has_room():
                await asyncio.sleep(POLL_S)

    async def _release_idle(self) -> None:
        if len(self._shelf.held) > 1:
            readers = await self._store.members(READERS)
            for version in self._shelf.idle(int(reader["version"]) for reader in readers.values()):
                await self._release(version)

    async def _release(self, version: int) -> None:
        self._shelf.release(version)
        await self._holder.release(version)

    async def publish(self, snapshot: Snapshot, digest: str, parts: Sequence[Part] = ()) -> Manifest:
        """Make `snapshot`, together with the `parts` that other ranks hold, the run's current version. After a restart
        the same version may be published again, with the same digest and new endpoints. Raises WeightsError where a
        newer or a different one is published already."""
        version = snapshot.version
        found, current, stamp = await self._check(version, digest)
        if version not in self._shelf.held:
            await self.make_room()
            self._shelf.freeze(version)
        await self._add_deltas(snapshot)
        try:
            own = await self._holder.hold(snapshot)
            tensors, buckets, sources = await asyncio.to_thread(merge, [own, *parts])
            manifest = Manifest(
                run=self._bus.subjects.run, version=version, epoch=stamp.epoch, parent=current and current.version,
                digest=digest, size_bytes=sum(entry.size_bytes for entry in tensors), tensors=tensors, buckets=buckets,
                sources=sources, created=time.time(),
            )  # fmt: skip
            await self._store.compare_and_set(DOCUMENT, found, str(stamp), manifest.model_dump(mode="json"))
        except (WeightsError, StoreConflict) as error:
            if version != self._shelf.published:
                await self._release(version)
            raise WeightsError(f"version {version} is not published: {error}") from error
        self._shelf.publish(version)
        await self._bus.announce(f"weights.{self._bus.subjects.run}", str(version).encode())
        await self._release_idle()
        return manifest

    async def _check(self, version: int, digest: str) -> tuple[str, Manifest | None, Stamp]:
        if self._lost or self._lease is None or self._renewing is None:
            raise WeightsError(self._lost or "this publisher is not started")
        if self._renewing.done():
            self._renewing.result()
        found, value = await self._store.versioned(DOCUMENT)
        current = None if value is None else Manifest.model_validate(value)
        stamp = Stamp(version, self._lease.token)
        check_publication(Stamp.parse(found), current.digest if current else "", stamp, digest)
        return found, current, stamp

    async def _add_deltas(self, snapshot: Snapshot) -> None:
        """Only where an engine reads over a network: memory is faster than the making of a delta."""
        base = self._holder.snapshots.get(self._shelf.published or 0)
        engines = await self._store.members("engine")
        far = any(engine.get("transport") == "tcp" for engine in engines.values())
        if far and base is not None and base.version < snapshot.version:
            await asyncio.to_thread(snapshot.add_deltas, base)
