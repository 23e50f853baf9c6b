"""Reading from one source, in a thread: the fastest healthy transport, and every bucket verified as it arrives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from postroad.weights import deltas
from postroad.weights.manifest import Source
from postroad.weights.protocol import Reading, WeightsError
from postroad.weights.snapshot import checksum
from postroad.weights.staging import Staging
from postroad.weights.transports import READERS, Pull, Reader, Wanted

PROBE_BYTES = 32 * 1024 * 1024
FORGIVEN_S = 300.0


class Rates:
    """What each transport gave, per source, in bytes per second of its last read."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str], float] = {}
        self._failed: dict[tuple[str, str], float] = {}

    def measured(self, source: str, transport: str, rate: float) -> None:
        self._rates[source, transport] = rate
        self._failed.pop((source, transport), None)

    def failed(self, source: str, transport: str, now: float) -> None:
        self._rates.pop((source, transport), None)
        self._failed[source, transport] = now

    def order(self, source: str, transports: Iterable[str], now: float) -> list[str]:
        """Those that are to be probed first, then by rate; what failed in the last FORGIVEN_S comes last."""

        def rank(transport: str) -> float:
            if now - self._failed.get((source, transport), -math.inf) < FORGIVEN_S:
                return math.inf
            return -self._rates.get((source, transport), math.inf)

        return sorted(transports, key=rank)

    def is_measured(self, source: str, transport: str) -> bool:
        return (source, transport) in self._rates

    def best(self) -> dict[str, float]:
        """The best rate of each transport over all sources, for whoever shows it."""
        best: dict[str, float] = {}
        for (_, transport), rate in self._rates.items():
            best[transport] = max(rate, best.get(transport, 0.0))
        return best


@dataclass
class Session:
    """What all reads of one pull share. Their threads touch different buckets."""

    pull: Pull
    staging: Staging
    reading: Reading
    rates: Rates
    transports: Sequence[str]
    moved: dict[str, int] = field(default_factory=dict)  # bytes by transport


class SourceRead:
    def __init__(self, session: Session, source: Source) -> None:
        self._session, self._source = session, source
        self._manifest = session.pull.manifest
        self._offsets: dict[int, int] = {}
        self._deltas: dict[int, int] = {}
        self._readers: dict[str, Reader] = {}

    def run(self, numbers: Sequence[int]) -> str:
        """Read buckets; why some are still missing, or "". Each transport is left at its first fault."""
        session, name = self._session, self._source.name
        endpoints = {str(e.get("transport")): e for e in self._source.endpoints}
        left = [t for t in session.transports if t in endpoints and t in READERS]
        faults, todo = [], list(numbers)
        try:
            self._offsets, self._deltas = self._manifest.offsets(self._source)
            while todo and left:
                transport = session.rates.order(name, left, time.monotonic())[0]
                probing = len(left) > 1 and not session.rates.is_measured(name, transport)
                try:
                    if transport not in self._readers:
                        self._readers[transport] = READERS[transport](endpoints[transport], session.pull)
                    self._transfer(transport, self._first(todo) if probing else todo)
                except (OSError, WeightsError, ValueError, KeyError) as error:  # the source may say what it likes
                    faults.append(f"{transport}: {error or error!r}")
                    session.rates.failed(name, transport, time.monotonic())
                    left.remove(transport)
                todo = [number for number in todo if number in session.reading.missing]
        except WeightsError as error:
            return str(error)
        finally:
            for reader in self._readers.values():
                reader.close()
        return ("; ".join(faults) or "no transport that works here") if todo else ""

    def _first(self, numbers: Sequence[int]) -> Sequence[int]:
        """As many as a probe takes."""
        size = 0
        for count, number in enumerate(numbers, 1):
            size += self._manifest.buckets[number].size_bytes
            if size >= PROBE_BYTES:
                return numbers[:count]
        return numbers

    def _transfer(self, transport: str, numbers: Sequence[int]) -> None:
        """Read, and verify what has arrived while more of it arrives: in the kernel's buffers, or NIXL's process. One
        thread for both is faster than two, because what it has just copied is still in its cache."""
        session, reader = self._session, self._readers[transport]
        started, size, come, broken = time.monotonic(), 0, 0, []
        with closing(reader.read(self._wanted(reader, numbers))) as arriving:
            try:
                for item in arriving:
                    size, come = size + item.target.size, come + 1
                    session.reading.check(time.monotonic())
                    if not self._verify(item):
                        broken.append(item.number)
            finally:
                session.moved[transport] = session.moved.get(transport, 0) + size
        if broken:
            raise WeightsError(f"bucket {broken[0]} does not have its checksum ({len(broken)} of {come} do not)")
        if come != len(numbers):
            raise WeightsError(f"{len(numbers) - come} buckets did not come")
        session.rates.measured(self._source.name, transport, size / max(time.monotonic() - started, 1e-6))

    def _wanted(self, reader: Reader, numbers: Sequence[int]) -> list[Wanted]:
        staging, wanted = self._session.staging, []
        for number in numbers:
            bucket = self._manifest.buckets[number]
            if reader.deltas and number in self._deltas and bucket.delta and staging.found[number] == bucket.delta.base:
                blob = np.empty(bucket.delta.size_bytes, dtype=np.uint8)
                wanted.append(Wanted(number, self._deltas[number], blob, is_delta=True))
            else:
                staging.found[number] = ""
                wanted.append(Wanted(number, self._offsets[number], staging.target(number, bucket)))
        return wanted

    def _verify(self, item: Wanted) -> bool:
        bucket, staging = self._manifest.buckets[item.number], self._session.staging
        target = staging.target(item.number, bucket)
        if item.is_delta:
            if bucket.delta is None or checksum(item.target) != bucket.delta.checksum:
                return False
            staging.found[item.number] = ""
            deltas.apply(item.target, target)
        found = checksum(target)
        if not self._session.reading.accept(item.number, found):
            return False
        staging.found[item.number] = found
        return True
