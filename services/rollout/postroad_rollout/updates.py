"""The weight puller of one engine: it converges by itself on the newest published version, without a barrier."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Protocol

import numpy as np
import torch
from nats.aio.msg import Msg

from postroad.bus import Bus
from postroad.messages import Event
from postroad.weights import Manifest, Puller, WeightsError

logger = logging.getLogger(__name__)

POLL_S = 2.0
PULL_DEADLINE_S = 120.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class Served(Protocol):
    """What the puller needs of an engine."""

    version: int
    digest: str

    def stage(self, tensors: Any) -> None: ...

    def activate(self, version: int, digest: str, mode: str) -> float: ...


class Updater:
    """Pulls, verifies, stages and activates. A failed pull leaves the served weights as they are and is tried again."""

    def __init__(self, engine: Served, bus: Bus, puller: Puller, *, name: str, mode: str) -> None:
        self._engine, self._bus, self._puller, self._name, self._mode = engine, bus, puller, name, mode
        self._announced = asyncio.Event()
        self.current = asyncio.Event()  # set while the engine serves the newest version that it knows of
        self.switched = asyncio.Event()  # set at each activation, for whoever tells others
        self.failures = 0

    async def run(self) -> None:
        """Until cancelled: wake at announcements, and every POLL_S seconds in case one was lost."""

        async def wake(_: Msg) -> None:
            self._announced.set()

        await self._bus.client.subscribe(f"weights.{self._bus.subjects.run}", cb=wake)
        while True:
            self._announced.clear()
            try:
                await self.converge()
            except WeightsError as error:
                self.failures += 1
                logger.warning("still serving version %d: %s", self._engine.version, error)
            try:
                await asyncio.wait_for(self._announced.wait(), POLL_S)
            except TimeoutError:
                continue

    async def converge(self) -> None:
        """Serve the newest version, if it is not served already. Raises WeightsError where it can't be had."""
        manifest = await self._puller.current()
        if manifest is None:
            return
        if (manifest.version, manifest.digest) != (self._engine.version, self._engine.digest):
            await self._switch(manifest)
        self.current.set()

    async def _switch(self, manifest: Manifest) -> None:
        started = time.monotonic()
        transport = await self._puller.pull(manifest, deadline_s=PULL_DEADLINE_S)
        pulled = time.monotonic()
        pause_ms = await asyncio.to_thread(self._activate, manifest)
        fields = {
            "engine": self._name,
            "version": manifest.version,
            "transport": transport,
            "size_bytes": manifest.size_bytes,
            "pull_s": pulled - started,
            "pause_ms": pause_ms,
        }
        self.switched.set()
        logger.info("version %d activated", manifest.version, extra=fields)
        event = Event(
            run=self._bus.subjects.run,
            id=f"{self._name}.{manifest.version}.{time.time_ns()}",
            service="engine",
            name="activated",
            fields=fields,
            created=time.time(),
        )
        await self._bus.publish(self._bus.subjects.event("engine"), event)

    def _activate(self, manifest: Manifest) -> float:
        self._engine.stage(
            (entry.name, _tensor(data, entry.dtype, entry.shape)) for entry, data in self._puller.tensors(manifest)
        )
        return self._engine.activate(manifest.version, manifest.digest, self._mode)


def _tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(data).view(DTYPES[dtype]).reshape(shape)
