"""`python weights_process.py source|reader`: one end of the weight plane, for tests that kill it. Orders come on standard
input, one answer a line goes to standard output, both JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import numpy as np

from postroad.bus import Bus
from postroad.store import Store
from postroad.weights import Publisher, Puller, Snapshot, WeightsError, protocol, publisher, puller, relay, slices

LEASE_S = 2.0
BUCKET_BYTES = 64 * 1024
ROWS = 1024
RUN, KEY = "chaos", "chaos-key"


def make_small() -> None:
    """Leases that end soon and buckets that are many, so that a fault costs little time."""
    for module in (protocol, publisher, puller, relay):
        module.LEASE_S = LEASE_S
    slices.BUCKET_BYTES = BUCKET_BYTES


def content(version: int) -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    """Three tensors of `version`, the middle one of eight buckets."""
    generator = np.random.default_rng(version)
    shapes = {"first": (100, 64), "middle": (ROWS, 128), "last": (33,)}
    return [
        (n, "float32", s, np.frombuffer(generator.bytes(4 * int(np.prod(s))), dtype=np.uint8).copy())
        for n, s in shapes.items()
    ]


class Engine:
    """Serves the tensors of one version, whole."""

    def __init__(self) -> None:
        self.version = 0
        self.active: dict[str, np.ndarray] = {}

    def activate(self, puller: Puller, manifest) -> None:
        staged = {entry.name: data.copy() for entry, data in puller.tensors(manifest)}
        self.version, self.active = manifest.version, staged

    def intact(self) -> bool:
        expected = content(self.version) if self.active else []
        return all(np.array_equal(self.active[name], data) for name, _, _, data in expected)


async def source(nats_url: str, redis_url: str, transports: list[str]) -> None:
    bus, store = await Bus.connect(nats_url, RUN), await Store.connect(redis_url, RUN)
    published = Publisher(bus, store, KEY, transports=transports)
    await published.start()
    snapshots: dict[int, Snapshot] = {}
    answer({"ready": os.getpid()})
    while order := json.loads(await asyncio.to_thread(sys.stdin.readline) or "null"):
        if "publish" in order:
            version = order["publish"]
            await published.make_room()
            snapshots = {version: Snapshot.freeze(RUN, version, content(version))}
            await published.publish(snapshots[version], f"d{version}")
        elif "flip" in order:
            for snapshot in snapshots.values():
                snapshot.image.bytes[order["flip"]] ^= 1 << (order["flip"] % 8)
        answer({"held": sorted(published._shelf.held)})


async def reader(nats_url: str, redis_url: str, transports: list[str]) -> None:
    store = await Store.connect(redis_url, RUN)
    pulling = Puller(store, KEY, name="engine-0", transports=transports, stall_s=0.5)
    engine = Engine()
    answer({"ready": os.getpid()})
    while order := json.loads(await asyncio.to_thread(sys.stdin.readline) or "null"):
        manifest = await pulling.current()
        started = time.monotonic()
        try:
            await pulling.pull(manifest, deadline_s=order["deadline_s"])
            engine.activate(pulling, manifest)
            fault = ""
        except WeightsError as error:
            fault = str(error)
        answer({"version": engine.version, "intact": engine.intact(), "fault": fault, "s": time.monotonic() - started})


def answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    make_small()
    role = {"source": source, "reader": reader}[sys.argv[1]]
    asyncio.run(role(sys.argv[2], sys.argv[3], sys.argv[4].split(",")))
