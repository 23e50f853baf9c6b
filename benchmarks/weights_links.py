"""What the transports of the weight plane give, beside the same bytes over the bare transport."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import signal
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil

from postroad.bus import Bus
from postroad.store import Store
from postroad.weights import Publisher, Puller, Snapshot
from postroad.weights.nixl import installed
from postroad.weights.snapshot import Image

SIZE_BYTES = 270_000_000
TENSORS = 30
CHUNKS = 16
RUN, KEY = "links", "benchmark-key"
TRANSPORTS = ("shared_memory", "nixl", "tcp")


@dataclass
class Links:
    """GB/s of each round, by name; what a reader's memory grew by over its image, in bytes."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    growth_bytes: int = 0
    freeze_s: float = 0.0

    def add(self, name: str, seconds: float) -> None:
        self.rates.setdefault(name, []).append(SIZE_BYTES / seconds / 1e9)

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def ratio(self, plane: str, bare: str) -> float:
        """Median over the rounds, each against the bare transfer just before it."""
        return statistics.median(a / b for a, b in zip(self.rates[plane], self.rates[bare], strict=True))


def _tensors(seed: int) -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    rows = SIZE_BYTES // TENSORS // 2000
    generator = np.random.default_rng(seed)
    return [
        (f"t{n}", "bfloat16", (rows, 1000), np.frombuffer(generator.bytes(rows * 2000), np.uint8))
        for n in range(TENSORS)
    ]


# ── sources, each in a process of its own ────────────────────────────────────────────────────────────────────────────
def _plane_source(pipe: Connection, nats_url: str, redis_url: str) -> None:
    async def run() -> None:
        bus, store = await Bus.connect(nats_url, RUN), await Store.connect(redis_url, RUN)
        publisher = Publisher(bus, store, KEY, transports=TRANSPORTS)
        await publisher.start()
        tensors = _tensors(1)
        started = time.monotonic()
        snapshot = await asyncio.to_thread(Snapshot.freeze, RUN, 1, tensors)
        frozen = time.monotonic()
        await publisher.publish(snapshot, "d1")
        pipe.send(frozen - started)
        await asyncio.to_thread(pipe.recv)
        await publisher.close()

    asyncio.run(run())


def _socket_source(pipe: Connection) -> None:
    data = np.random.default_rng(0).integers(0, 255, SIZE_BYTES, dtype=np.uint8)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(data.data)


def _nixl_source(pipe: Connection, module: str, memory: str) -> None:
    agent, buffer = _nixl_agent(module, "bare-source", memory)
    buffer[:] = 7
    pipe.send((agent.get_agent_metadata(), buffer.ctypes.data))
    pipe.recv()
    os._exit(0)


def _nixl_agent(module: str, name: str, memory: str) -> tuple[Any, np.ndarray]:
    import importlib

    nixl = importlib.import_module(module)
    make_agent = nixl.nixlBind.nixlAgent

    def paced(agent_name: str, config: Any) -> Any:  # or its threads would take both cores from whoever is measured
        config.pthrDelay = 1000
        return make_agent(agent_name, config)

    nixl.nixlBind.nixlAgent = paced
    agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))
    buffer = Image(name, SIZE_BYTES).bytes if memory == "shared" else np.empty(SIZE_BYTES, dtype=np.uint8)
    buffer[:] = 1
    agent.register_memory([(buffer.ctypes.data, SIZE_BYTES, 0, name)], "DRAM")
    return agent, buffer


# ── bare readers ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _nixl_reader(pipe: Connection, module: str, memory: str) -> None:
    """Reads when it is told to, and says how long it took: a process of its own, as the plane's is."""
    agent, buffer = _nixl_agent(module, "bare-reader", memory)
    metadata, address = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    step = -(-SIZE_BYTES // CHUNKS)
    places = [(offset, min(step, SIZE_BYTES - offset)) for offset in range(0, SIZE_BYTES, step)]
    local = agent.get_xfer_descs([(buffer.ctypes.data + offset, size, 0) for offset, size in places], "DRAM")
    remote = agent.get_xfer_descs([(address + offset, size, 0) for offset, size in places], "DRAM")
    while pipe.recv():
        started = time.monotonic()
        handle = agent.initialize_xfer("READ", local, remote, peer)
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(0.0002)
            state = agent.check_xfer_state(handle)
        pipe.send(time.monotonic() - started)
        agent.release_xfer_handle(handle)
    os._exit(0)


def _read_socket(port: int, buffer: np.ndarray) -> float:
    started, done = time.monotonic(), 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        while done < SIZE_BYTES:
            done += connection.recv_into(buffer.data[done:])
    return time.monotonic() - started


class Process:
    """A spawned function with a pipe."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(target=function, args=(theirs, *arguments), daemon=True)
        self.process.start()

    def receive(self, deadline_s: float = 120.0) -> Any:
        if not self.pipe.poll(deadline_s):
            raise TimeoutError(f"{self.process.name} said nothing for {deadline_s} s")
        return self.pipe.recv()

    def end(self) -> None:
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


async def measure(nats_url: str, redis_url: str, rounds: int) -> Links:
    """Each round: bare TCP, the plane's TCP; bare NIXL between memory as the plane has it (shared) and between private
    memory, which has huge pages; the plane's NIXL, and its shared memory."""
    module = installed()
    if not module:
        sys.exit("NIXL is not installed: pip install 'postroad[rdma]'")
    plane, bare = Process(_plane_source, nats_url, redis_url), Process(_socket_source)
    sources = {memory: Process(_nixl_source, module, memory) for memory in ("private", "shared")}
    readers = {memory: Process(_nixl_reader, module, memory) for memory in sources}
    store, links = await Store.connect(redis_url, RUN), Links()
    pullers = {transport: Puller(store, KEY, transports=[transport]) for transport in ("tcp", "nixl", "shared_memory")}
    try:
        links.freeze_s = plane.receive()
        port = bare.receive()
        for memory, reader in readers.items():
            reader.pipe.send(sources[memory].receive())
        buffer = np.ones(SIZE_BYTES, dtype=np.uint8)
        before = psutil.Process().memory_full_info().uss
        for number in range(rounds + 1):  # the first warms up: pages, connections, NIXL's process
            keep = links if number else Links()
            keep.add("bare tcp", _read_socket(port, buffer))
            keep.add("tcp", await _pull(pullers["tcp"]))
            if not number:
                links.growth_bytes = psutil.Process().memory_full_info().uss - before - SIZE_BYTES
            for memory, reader in readers.items():
                reader.pipe.send(True)
                keep.add(f"bare nixl, {memory}", reader.receive())
            for transport in ("nixl", "shared_memory"):
                keep.add(transport, await _pull(pullers[transport]))
    finally:
        for puller in pullers.values():
            await puller.close()
        for process in (plane, bare, *sources.values(), *readers.values()):
            process.end()
        await store.close()
    return links


async def _pull(puller: Puller) -> float:
    """Seconds of one whole pull, with nothing of it there before: leases, transfer and verification."""
    staging = puller._staging
    staging.found = dict.fromkeys(staging.found, "")
    manifest = await puller.current()
    assert manifest is not None
    started = time.monotonic()
    await puller.pull(manifest, deadline_s=60)
    return time.monotonic() - started
