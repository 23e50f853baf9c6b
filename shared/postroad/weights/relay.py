"""An engine that lets others read what it has verified: so a version spreads as a tree, and not from its source alone."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from postroad.store import Store, StoreError
from postroad.weights.manifest import RELAYS, Manifest, Source
from postroad.weights.protocol import LEASE_S
from postroad.weights.server import ImageServer
from postroad.weights.slices import runs
from postroad.weights.snapshot import Image
from postroad.weights.staging import Staging
from postroad.weights.transports import SharedMemoryReader

logger = logging.getLogger(__name__)


class Relay:
    """Its image is the staging of a puller: withdrawn before the next version is read into it."""

    def __init__(self, store: Store, key: str, name: str) -> None:
        self._store, self._name = store, name
        self._image: tuple[int, Image] | None = None
        self._server = ImageServer(self._find, key)
        self._telling: asyncio.Task[None] | None = None

    def _find(self, version: int) -> Image | None:
        return self._image[1] if self._image is not None and self._image[0] == version else None

    async def start(self, host: str, advertise: str = "") -> None:
        await self._server.start(host, advertise)

    async def offer(self, manifest: Manifest, staging: Staging, nixl: dict[str, Any] | None) -> None:
        """`nixl`: how NIXL reads the staging, where it is in use."""
        self._image = (manifest.version, staging.image)
        endpoints = [SharedMemoryReader.endpoint_of(staging.image), self._server.endpoint()]
        if nixl is not None:
            endpoints.append({"transport": "nixl", **nixl})
        source = Source(name=self._name, runs=runs(staging.offsets), endpoints=endpoints)
        info = {"version": manifest.version, "digest": manifest.digest, "source": source.model_dump(mode="json")}
        await self._store.register(RELAYS, self._name, info, LEASE_S)
        self._telling = asyncio.create_task(self._tell(info))

    async def _tell(self, info: dict[str, Any]) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                await self._store.register(RELAYS, self._name, info, LEASE_S)
            except StoreError as error:
                logger.warning("this relay is not registered: %s", error)

    async def withdraw(self) -> None:
        """Readers in the middle of it find that the checksums no longer fit, and go elsewhere."""
        self._image = None
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait({self._telling})
            self._telling = None
            await self._store.leave(RELAYS, self._name)

    async def close(self) -> None:
        await self.withdraw()
        await self._server.close()


async def relays(store: Store, manifest: Manifest) -> list[Source]:
    """The live ones that have this very version."""
    members = await store.members(RELAYS)
    return [
        Source.model_validate(info["source"])
        for info in members.values()
        if (info["version"], info["digest"]) == (manifest.version, manifest.digest)
    ]
