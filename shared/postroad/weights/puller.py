"""The engine's side: read a version bucket by bucket, verify each, and hand out tensors only when all are right."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import Counter, Gauge

from postroad.store import Lease, LeaseLost, Store, StoreError
from postroad.weights.manifest import DOCUMENT, Manifest, Source, TensorEntry
from postroad.weights.manifest import READERS as READER_REGISTRY
from postroad.weights.nixl import NixlProcess
from postroad.weights.protocol import LEASE_S, Reading, WeightsError
from postroad.weights.reads import Rates, Session, SourceRead
from postroad.weights.relay import Relay, relays
from postroad.weights.slices import spread
from postroad.weights.staging import Staging, Want
from postroad.weights.transports import READERS, Pull

logger = logging.getLogger(__name__)

READS_PER_SOURCE = 2  # at a time; who comes later waits, or reads from those who are done
SOURCES_PER_READER = 8
POLL_S = 0.05
MOVED = Counter("postroad_weights_moved_bytes", "Bytes of weights that were read, deltas as they travel", ["transport"])
RATE = Gauge("postroad_weights_rate_bytes", "Bytes per second of the last read, best of the sources", ["transport"])


class Puller:
    """Keeps one staging image, reused from version to version. One pull at a time."""

    def __init__(
        self, store: Store, key: str, *, name: str = "", want: Want | None = None,
        transports: Sequence[str] = tuple(READERS), stall_s: float = 10.0,
    ) -> None:  # fmt: skip
        self.name = name or f"reader-{uuid.uuid4().hex}"
        self.rates = Rates()
        self.transport = ""  # what gave most of the last version
        self.bytes_moved = 0  # over all sources and transports, since the start
        self._store, self._key, self._stall_s = store, key, stall_s
        self._transports = tuple(transports)
        self._holder = uuid.uuid4().hex
        self._staging = Staging(self.name, want)
        self._reading = Reading()
        self._nixl = NixlProcess()
        self._manifest: tuple[str, Manifest] | None = None
        self._relay: Relay | None = None

    async def current(self) -> Manifest | None:
        """The newest published version, or None."""
        stamp = await self._store.version_of(DOCUMENT)
        if self._manifest is None or self._manifest[0] != stamp:
            found, value = await self._store.versioned(DOCUMENT)
            self._manifest = None if value is None else (found, Manifest.model_validate(value))
        return self._manifest[1] if self._manifest else None

    async def pull(self, manifest: Manifest, *, deadline_s: float) -> str:
        """Read and verify into staging what is not there already; the transport that gave most of it. Raises
        WeightsError where no source gave verified buckets within `deadline_s`; nothing is handed out then."""
        leases: dict[str, Lease] = {}
        try:
            if self._relay is not None:
                await self._relay.withdraw()
            leases[""], others, _ = await asyncio.gather(
                self._store.acquire(f"weights.reader.{self.name}", self._holder, LEASE_S),
                relays(self._store, manifest),
                self._store.register(READER_REGISTRY, self.name, {"version": manifest.version}, LEASE_S),
            )
            missing = self._staging.prepare(manifest)
            self._reading.begin(manifest.stamp, missing, leases[""].token, time.monotonic(), deadline_s)
            end = self._reading.deadline
            pull = Pull(manifest, self._key, self._staging.image, self._stall_s, end, self._nixl)
            session = Session(pull, self._staging, self._reading, self.rates, self._transports)
            renewing = asyncio.create_task(self._renew(manifest, leases))
            try:
                await self._rounds(session, leases, others)
            finally:
                for transport, size in session.moved.items():
                    self.bytes_moved += size
                    MOVED.labels(transport).inc(size)
                renewing.cancel()
                await asyncio.wait({renewing})
                releases = [self._store.release(held) for held in leases.values()]
                await asyncio.gather(*releases, self._store.leave(READER_REGISTRY, self.name))
            if self._relay is not None:
                over_nixl = "nixl" in session.moved
                nixl = await asyncio.to_thread(self._nixl.register, self._staging.image) if over_nixl else None
                await self._relay.offer(manifest, self._staging, nixl)
        except StoreError as error:
            raise WeightsError(f"version {manifest.version} could not be read: {error}") from error
        finally:
            if self._reading.state != "verified":
                self._reading.fail()
        for transport, rate in self.rates.best().items():
            RATE.labels(transport).set(rate)
        self.transport = max(session.moved, key=session.moved.__getitem__, default="nothing")
        return self.transport

    def tensors(self, manifest: Manifest) -> Iterator[tuple[TensorEntry, np.ndarray]]:
        """The staged tensors as uint8 arrays, valid until the next pull. Raises WeightsError where `manifest` is not what
        was pulled and verified last."""
        self._reading.hand_out(manifest.stamp)
        return self._staging.tensors(manifest)

    def info(self) -> dict[str, object]:
        """For a registry: what carried the last version, what each transport gave at best (bytes/s), what was moved."""
        rates = {transport: round(rate) for transport, rate in self.rates.best().items()}
        return {"transport": self.transport, "transport_rates": rates, "weights_moved_bytes": self.bytes_moved}

    async def serve(self, host: str, advertise: str = "") -> None:
        """From now on let other readers have what this one has verified."""
        self._relay = Relay(self._store, self._key, self.name)
        await self._relay.start(host, advertise)

    async def close(self) -> None:
        if self._relay is not None:
            await self._relay.close()
        self._nixl.close()
        self._staging.close()

    # ── the leases of a pull ─────────────────────────────────────────────────────────────────────────────────────
    async def _renew(self, manifest: Manifest, leases: dict[str, Lease]) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                for name, lease in list(leases.items()):
                    renewed = await self._store.acquire(lease.name, self._holder, LEASE_S)
                    if name == "":
                        self._reading.renew(renewed.token, time.monotonic())
                await self._store.register(READER_REGISTRY, self.name, {"version": manifest.version}, LEASE_S)
            except StoreError as error:
                logger.warning("the leases of a pull could not be renewed: %s", error)
            except WeightsError as error:
                logger.warning("%s", error)
                return

    async def _slots(self, sources: Sequence[Source], leases: dict[str, Lease]) -> list[Source]:
        """Those of `sources` that have a free slot for one more reader; the slots are then held by this one."""

        async def take(source: Source) -> bool:
            for slot in random.sample(range(READS_PER_SOURCE), READS_PER_SOURCE):
                with contextlib.suppress(LeaseLost):
                    name = f"weights.slot.{source.name}.{slot}"
                    leases[source.name] = await self._store.acquire(name, self._holder, LEASE_S)
                    return True
            return False

        asked = random.sample(list(sources), min(len(sources), SOURCES_PER_READER))
        return [source for source, taken in zip(asked, await asyncio.gather(*map(take, asked)), strict=True) if taken]

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────
    async def _rounds(self, session: Session, leases: dict[str, Lease], others: list[Source]) -> None:
        """Until nothing is missing: spread what is missing over the healthy sources that have a slot, and read it."""
        manifest, faults = session.pull.manifest, dict[str, str]()
        while self._reading.state == "reading":
            self._reading.check(time.monotonic())
            missing = {number: manifest.buckets[number].size_bytes for number in self._reading.missing}
            healthy = [source for source in (*manifest.sources, *others) if source.name not in faults]
            useful = [source for source in healthy if not missing.keys().isdisjoint(source.buckets())]
            if not useful:
                told = "; ".join(f"{name}: {fault}" for name, fault in faults.items()) or "nobody holds it"
                raise WeightsError(f"version {manifest.version} could not be read: {told}")
            granted = {source.name: source for source in await self._slots(useful, leases)}
            if not granted:
                await asyncio.sleep(POLL_S)
                others = await relays(self._store, manifest)
                continue
            plan = spread(missing, {name: source.buckets() for name, source in granted.items()})
            reads = {name: SourceRead(session, granted[name]) for name in plan}
            told_by = await asyncio.gather(*(asyncio.to_thread(reads[name].run, plan[name]) for name in plan))
            faults |= {name: fault for name, fault in zip(plan, told_by, strict=True) if fault}
            if self._reading.state == "reading":  # otherwise they go with the lease of the pull
                await asyncio.gather(*(self._store.release(leases.pop(name)) for name in granted))
                others = await relays(self._store, manifest)
        if self._reading.state != "verified":
            raise WeightsError(f"version {manifest.version} was given up")
