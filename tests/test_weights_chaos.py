"""Faults of the weight plane's transfers: nothing torn is ever served, nothing hangs, and one retry repairs it.

`POSTROAD_WEIGHT_FAULTS` random faults (55, or 500 in the slow form), each on a version of its own, between processes: the
source is one, the reader another or this one, the network between them a proxy that cuts, flips and stalls.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from weights_process import BUCKET_BYTES, KEY, LEASE_S, RUN, Engine

from postroad.store import Store
from postroad.weights import Manifest, Puller, WeightsError
from postroad.weights import transports as transports_module
from postroad.weights.nixl import installed

DEADLINE_S = 8.0
MARGIN_S = 2.0  # a loaded machine
STALL_S = 0.5
ALL = ["shared_memory", "tcp", *(["nixl"] if installed() else [])]


class Child:
    """A weights_process, in a group of its own: NIXL's process lives and dies with it."""

    def __init__(self, role: str, *arguments: str) -> None:
        self.role, self.arguments = role, arguments

    async def start(self) -> Child:
        script = str(Path(__file__).with_name("weights_process.py"))
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, script, self.role, *self.arguments, start_new_session=True,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        await self.answer()
        return self

    def order(self, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    async def answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 30)
        assert line, f"the {self.role} died"
        return json.loads(line)

    async def ask(self, **order: object) -> dict[str, object]:
        self.order(**order)
        return await self.answer()

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.signal(signal.SIGKILL)
            await self.process.wait()


class Proxy:
    """The network between a reader and the source's TCP server; `fault` acts on one connection, at byte `at` of it."""

    def __init__(self) -> None:
        self.target = 0
        self.tasks: set[asyncio.Task[None] | None] = set()
        self.fault, self.at = "", 0

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())
        fault, self.fault = self.fault, ""
        try:
            source, to_source = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        forward = asyncio.create_task(pump(reader, to_source))
        try:
            await self.answer(source, writer, fault)
        except OSError:
            pass  # one of the two is gone, which is what this is for
        finally:
            forward.cancel()
            self.tasks.discard(asyncio.current_task())
            to_source.transport.abort()
            writer.transport.abort()

    async def answer(self, source: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str) -> None:
        passed = 0
        while data := await source.read(65536):
            if fault and passed + len(data) > self.at:
                cut = self.at - passed
                if fault == "flip":
                    data, fault = data[:cut] + bytes([data[cut] ^ 4]) + data[cut + 1 :], ""
                else:
                    writer.write(data[:cut])
                    await writer.drain()
                    if fault == "stall":
                        await asyncio.sleep(STALL_S + 2)
                    return
            writer.write(data)
            await writer.drain()
            passed += len(data)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


class Chaos:
    """A source, a reader in this process with its engine, and what is known of both."""

    def __init__(self, nats_url: str, redis_url: str, store: Store, seed: int) -> None:
        self.arguments = (nats_url, redis_url, ",".join(ALL))
        self.store, self.random = store, random.Random(seed)
        self.proxy = Proxy()
        self.version = 0
        self.pullers = {t: Puller(store, KEY, name=f"chaos-{t}", transports=[t], stall_s=STALL_S) for t in ALL}
        self.engines = {t: Engine() for t in ALL}
        self.source: Child
        self.reader: Child | None = None
        self.outcomes: collections.Counter[str] = collections.Counter()

    async def start(self) -> None:
        await self.proxy.start()
        self.source = await Child("source", *self.arguments).start()
        for transport in ALL:
            await self.publish()
            await self.pull(transport)

    async def close(self) -> None:
        self.proxy.server.close()
        for puller in self.pullers.values():
            await puller.close()
        for child in (self.source, self.reader):
            if child is not None:
                await child.kill()

    async def publish(self) -> None:
        self.version += 1
        answer = await self.source.ask(publish=self.version)
        assert len(answer["held"]) <= 2, "more than two snapshots are held"

    async def replace_source(self) -> None:
        """The trainer restarts, and publishes what it had published, again."""
        await self.source.kill()
        self.source = await Child("source", *self.arguments).start()
        await self.source.ask(publish=self.version)

    async def manifest(self) -> Manifest:
        """The published one, with the proxy as the source's address."""
        manifest = await self.pullers["tcp"].current()
        [source] = manifest.sources
        endpoints = []
        for endpoint in source.endpoints:
            if endpoint["transport"] == "tcp":
                self.proxy.target = endpoint["port"]
                endpoint = {**endpoint, "port": self.proxy.port}
            endpoints.append(endpoint)
        return manifest.model_copy(update={"sources": [source.model_copy(update={"endpoints": endpoints})]})

    async def pull(self, transport: str) -> str:
        """One try of one engine; its fault. Whatever comes, it ends in time and the engine serves one whole version."""
        puller, engine, before = self.pullers[transport], self.engines[transport], self.engines[transport].version
        manifest = await self.manifest()
        started = time.monotonic()
        try:
            await puller.pull(manifest, deadline_s=DEADLINE_S)
            engine.activate(puller, manifest)
            fault = ""
        except WeightsError as error:
            fault = str(error)
        assert time.monotonic() - started < DEADLINE_S + MARGIN_S, f"hung: {fault}"
        assert engine.version == (before if fault else manifest.version)
        assert engine.intact(), "torn"
        return fault

    async def converge(self, transport: str) -> None:
        assert await self.pull(transport) == ""
        assert self.engines[transport].version == self.version


def in_mid_read(transport: str, buckets: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action` when so many buckets have been read."""
    original = transports_module.READERS[transport]

    class Faulty(original):  # type: ignore[misc, valid-type]
        def read(self, wanted):
            if buckets == 0:
                action()
            for number, item in enumerate(super().read(wanted), 1):
                yield item
                if number == buckets:
                    action()

    monkeypatch.setitem(transports_module.READERS, transport, Faulty)


async def network_fault(chaos: Chaos, fault: str) -> None:
    """At the boundary of a bucket or within one, in the header or in the data."""
    size = (await chaos.manifest()).size_bytes
    within_bucket = chaos.random.choice([0, 0, 1, chaos.random.randrange(BUCKET_BYTES)])
    chaos.proxy.at = min(chaos.random.randrange(10) * BUCKET_BYTES + within_bucket + 8, size)
    if chaos.random.random() < 0.1:
        chaos.proxy.at = chaos.random.randrange(8)
    await chaos.publish()
    chaos.proxy.fault = fault
    assert await chaos.pull("tcp") != "", f"{fault} at {chaos.proxy.at} went unnoticed"
    await chaos.converge("tcp")


async def source_killed(chaos: Chaos) -> None:
    transport = chaos.random.choice(ALL)
    await chaos.publish()
    with pytest.MonkeyPatch.context() as patch:
        in_mid_read(transport, chaos.random.randrange(9), lambda: chaos.source.signal(signal.SIGKILL), patch)
        await chaos.pull(transport)  # the memory of a dead source stays whole for who has opened it
    await chaos.replace_source()
    await chaos.converge(transport)


async def source_stopped(chaos: Chaos) -> None:
    transport = chaos.random.choice(ALL)
    await chaos.publish()
    with pytest.MonkeyPatch.context() as patch:
        in_mid_read(transport, chaos.random.randrange(9), lambda: chaos.source.signal(signal.SIGSTOP), patch)
        await chaos.pull(transport)
    chaos.source.signal(signal.SIGCONT)
    await chaos.source.ask(nothing=True)
    await chaos.converge(transport)


async def reader_killed(chaos: Chaos) -> None:
    """A reader's process dies in mid-read; its successor, of the same name, converges, and the trainer goes on."""
    if chaos.reader is None:
        chaos.reader = await Child("reader", *chaos.arguments).start()
    await chaos.publish()
    chaos.reader.order(deadline_s=DEADLINE_S)
    await asyncio.sleep(chaos.random.random() * 0.02)
    await chaos.reader.kill()
    chaos.reader = await Child("reader", *chaos.arguments).start()
    await chaos.publish()
    end = time.monotonic() + DEADLINE_S
    while (answer := await chaos.reader.ask(deadline_s=DEADLINE_S))["fault"]:
        assert "lease" in str(answer["fault"]) and time.monotonic() < end, answer  # that of its predecessor
        await asyncio.sleep(0.1)
    assert (answer["version"], answer["intact"]) == (chaos.version, True)


async def memory_flipped(chaos: Chaos) -> None:
    transport = chaos.random.choice(ALL)
    await chaos.publish()
    place = chaos.random.randrange(1000, 500_000)
    await chaos.source.ask(flip=place)
    assert "checksum" in await chaos.pull(transport)
    await chaos.source.ask(flip=place)
    await chaos.converge(transport)


async def reader_process_killed(chaos: Chaos) -> None:
    """NIXL's process of the reader dies: the engine does not."""
    await chaos.publish()
    if "nixl" not in ALL:
        await chaos.converge("tcp")
        return
    process = chaos.pullers["nixl"]._nixl
    with pytest.MonkeyPatch.context() as patch:
        in_mid_read("nixl", 0, lambda: process._process and process._process.kill(), patch)
        await chaos.pull("nixl")
    await chaos.converge("nixl")


FAULTS: list[tuple[int, Callable[[Chaos], object]]] = [
    (6, lambda chaos: network_fault(chaos, "cut")),
    (5, lambda chaos: network_fault(chaos, "flip")),
    (3, lambda chaos: network_fault(chaos, "stall")),
    (2, source_killed),
    (2, source_stopped),
    (1, reader_killed),
    (2, memory_flipped),
    (1, reader_process_killed),
]
NAMES = ["cut", "flip", "stall", "source killed", "source stopped", "reader killed", "memory flipped", "NIXL killed"]


@pytest.fixture
async def chaos(nats, valkey, monkeypatch) -> AsyncIterator[Chaos]:
    for module, name in (
        ("protocol", "LEASE_S"),
        ("publisher", "LEASE_S"),
        ("puller", "LEASE_S"),
        ("relay", "LEASE_S"),
    ):
        monkeypatch.setattr(f"postroad.weights.{module}.{name}", LEASE_S)
    store = await Store.connect(valkey.url, RUN)
    chaos = Chaos(nats.url, valkey.url, store, seed=int(os.environ.get("POSTROAD_WEIGHT_SEED", "7")))
    await chaos.start()
    yield chaos
    await chaos.close()
    await store.close()


async def run(chaos: Chaos, count: int) -> None:
    kinds = [number for number, (weight, _) in enumerate(FAULTS) for _ in range(weight)]
    chosen = (kinds * (count // len(kinds) + 1))[:count]
    chaos.random.shuffle(chosen)
    for number in chosen:
        await FAULTS[number][1](chaos)
        chaos.outcomes[NAMES[number]] += 1
    print(f"\n{count} faults, 0 torn, 0 hung, each repaired by one retry: {dict(chaos.outcomes)}")


async def test_random_faults(chaos):
    await run(chaos, 55)
    assert chaos.outcomes.total() == 55 and len(chaos.outcomes) == len(FAULTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_many_random_faults(chaos):
    faults = int(os.environ.get("POSTROAD_WEIGHT_FAULTS", "500"))
    await run(chaos, faults)
    assert chaos.outcomes.total() == faults
