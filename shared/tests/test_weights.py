"""The weight plane on a real store, with real sockets: verified or not at all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import pytest

from postroad.bus import Bus
from postroad.store import Store
from postroad.weights import Holder, Manifest, Publisher, Puller, Shard, Snapshot, WeightsError, reads
from postroad.weights import puller as puller_module
from postroad.weights.manifest import READERS as READER_REGISTRY
from postroad.weights.manifest import RELAYS
from postroad.weights.nixl import installed
from postroad.weights.publisher import TRANSPORTS
from postroad.weights.slices import shard, whole, within
from postroad.weights.transports import READERS

KEY = "mesh-key"


def tensors(seed: int) -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    generator = np.random.default_rng(seed)
    shapes = {"embedding": (1000, 64), "layer.weight": (3000, 3000), "norm": (7,), "scale": ()}
    return [
        (n, "float32", s, np.asarray(generator.random(s, dtype=np.float32)).reshape(-1).view(np.uint8))
        for n, s in shapes.items()
    ]


@dataclass
class Plane:
    bus: Bus
    store: Store
    publisher: Publisher
    puller: Puller

    async def publish(self, version: int, seed: int | None = None) -> Manifest:
        snapshot = Snapshot.freeze("r", version, tensors(version if seed is None else seed))
        return await self.publisher.publish(snapshot, f"digest-{version}")


@pytest.fixture
async def plane(nats, valkey, tmp_path, request) -> AsyncIterator[Plane]:
    bus, store = await Bus.connect(nats.url, "r"), await Store.connect(valkey.url, "r")
    transports = [*TRANSPORTS, "nixl"] if "nixl" in request.node.name else TRANSPORTS
    publisher = Publisher(bus, store, KEY, transports=transports, folder=tmp_path / "weights")
    await publisher.start()
    puller = Puller(store, KEY, stall_s=2)
    yield Plane(bus, store, publisher, puller)
    await puller.close()
    await publisher.close()
    await store.close()
    await bus.close()


def only(manifest: Manifest, transport: str) -> Manifest:
    sources = [
        source.model_copy(update={"endpoints": [e for e in source.endpoints if e["transport"] == transport]})
        for source in manifest.sources
    ]
    return manifest.model_copy(update={"sources": sources})


def assert_has(puller: Puller, manifest: Manifest, seed: int) -> None:
    for (entry, data), (name, _, shape, expected) in zip(puller.tensors(manifest), tensors(seed), strict=True):
        assert (entry.name, entry.shape) == (name, shape)
        assert np.array_equal(data, expected), name


nixl = pytest.param("nixl", marks=pytest.mark.skipif(not installed(), reason="NIXL is not installed (postroad[rdma])"))


@pytest.mark.parametrize("transport", ["shared_memory", "tcp", "folder", nixl])
async def test_a_pulled_version_is_the_published_one(plane, transport):
    await plane.publish(1)
    manifest = only(await plane.puller.current(), transport)
    assert await plane.puller.pull(manifest, deadline_s=20) == transport
    assert_has(plane.puller, manifest, 1)
    assert plane.puller.bytes_moved == manifest.size_bytes


async def test_the_folder_is_a_checkpoint_for_others(plane, tmp_path):
    from safetensors.numpy import load_file

    await plane.publish(1)
    loaded = load_file(tmp_path / "weights" / "v1" / "model.safetensors")
    for name, _, shape, expected in tensors(1):
        assert loaded[name].shape == shape and loaded[name].tobytes() == expected.tobytes()


async def test_each_transport_is_probed_and_the_fastest_used(plane, monkeypatch):
    def slow(reader):
        class Slow(reader):
            def read(self, wanted):
                for item in super().read(wanted):
                    time.sleep(0.1)
                    yield item

        return Slow

    monkeypatch.setattr(reads, "PROBE_BYTES", 1000)
    for transport in ("shared_memory", "folder"):
        monkeypatch.setitem(READERS, transport, slow(READERS[transport]))
    await plane.publish(1)
    await plane.puller.pull(await plane.puller.current(), deadline_s=20)
    assert set(plane.puller.rates.best()) == {"shared_memory", "tcp", "folder"}, "each was probed"
    await plane.publish(2)
    assert await plane.puller.pull(await plane.puller.current(), deadline_s=20) == "tcp"
    assert_has(plane.puller, await plane.puller.current(), 2)


async def test_a_transport_that_fails_is_left_for_the_next(plane):
    await plane.publish(2)
    manifest = await plane.puller.current()
    dead = [{**e, "pid": 1, "path": "/nowhere"} for e in manifest.sources[0].endpoints]
    manifest = manifest.model_copy(update={"sources": [manifest.sources[0].model_copy(update={"endpoints": dead})]})
    assert await plane.puller.pull(manifest, deadline_s=20) == "tcp"
    assert_has(plane.puller, manifest, 2)


async def test_a_flipped_byte_is_never_handed_out(plane):
    snapshot = Snapshot.freeze("r", 1, tensors(1))
    manifest = only(await plane.publisher.publish(snapshot, "digest-1"), "tcp")
    snapshot.image.bytes[20_000_000] ^= 1
    with pytest.raises(WeightsError, match="bucket 2 does not have its checksum"):
        await plane.puller.pull(manifest, deadline_s=20)
    with pytest.raises(WeightsError, match="not verified"):
        plane.puller.tensors(manifest)
    snapshot.image.bytes[20_000_000] ^= 1
    before = plane.puller.bytes_moved
    await plane.puller.pull(manifest, deadline_s=20)
    assert plane.puller.bytes_moved - before == manifest.buckets[2].size_bytes, "what was verified is read again"
    assert_has(plane.puller, manifest, 1)


async def test_versions_never_go_back_and_have_one_content(plane):
    await plane.publish(3)
    with pytest.raises(WeightsError, match="older than the published 3"):
        await plane.publish(2)
    with pytest.raises(WeightsError, match="did not repeat it"):
        await plane.publisher.publish(Snapshot.freeze("r", 3, tensors(4)), "digest-4")
    await plane.publish(3)
    await plane.puller.pull(await plane.puller.current(), deadline_s=20)


async def test_old_snapshots_are_released_and_their_readers_told(plane):
    first = await plane.publish(1)
    for version in (2, 3):
        await plane.publish(version)
    for transport in ("shared_memory", "tcp", "folder"):
        with pytest.raises(WeightsError, match="released|No such file"):
            await plane.puller.pull(only(first, transport), deadline_s=20)


async def test_a_snapshot_that_is_read_stays_until_its_reader_is_done_or_dead(plane):
    first = await plane.publish(1)
    await plane.store.register(READER_REGISTRY, "slow", {"version": 1}, 1.0)
    await plane.publish(2)
    await plane.puller.pull(first, deadline_s=20)
    await plane.publisher.make_room()  # waits for the lease of the reader, which does not renew it
    with pytest.raises(WeightsError, match="released"):
        await Puller(plane.store, KEY).pull(only(first, "tcp"), deadline_s=20)


async def test_a_second_publisher_is_refused_and_a_dead_ones_lease_ends(plane, monkeypatch):
    monkeypatch.setattr("postroad.weights.publisher.LEASE_S", 0.4)
    second = Publisher(plane.bus, plane.store, KEY)
    with pytest.raises(WeightsError, match="another publisher of this run is alive"):
        await second.start()
    await plane.publish(1)
    await plane.publisher.close()
    await second.start()
    republished = await second.publish(Snapshot.freeze("r", 1, tensors(1)), "digest-1")
    assert republished.epoch == 2
    await plane.puller.pull(republished, deadline_s=20)
    await second.close()


async def test_a_wrong_key_reads_nothing(plane):
    manifest = await plane.publish(1)
    with pytest.raises(WeightsError, match="the key is wrong"):
        await Puller(plane.store, "guess").pull(only(manifest, "tcp"), deadline_s=20)


async def test_a_dead_source_ends_in_an_error_not_a_hang(plane):
    manifest = await plane.publish(1)
    await plane.publisher.close()
    with pytest.raises(WeightsError, match="could not be read"):
        await plane.puller.pull(manifest, deadline_s=20)


async def test_equal_buckets_are_not_moved_and_changed_ones_as_deltas(plane):
    await plane.store.register("engine", "engine-0", {"transport": "tcp"}, 60.0)
    first = await plane.publish(1)
    await plane.puller.pull(only(first, "tcp"), deadline_s=20)
    changed = tensors(1)
    words = changed[1][3].copy().view(np.uint32)
    words[: words.size // 2 : 100] ^= 5
    changed[1] = (*changed[1][:3], words.view(np.uint8))
    manifest = only(await plane.publisher.publish(Snapshot.freeze("r", 2, changed), "digest-2"), "tcp")
    before = plane.puller.bytes_moved
    await plane.puller.pull(manifest, deadline_s=20)
    assert 0 < plane.puller.bytes_moved - before < first.size_bytes / 10
    for (_, data), (*_, expected) in zip(plane.puller.tensors(manifest), changed, strict=True):
        assert np.array_equal(data, expected)
    late = Puller(plane.store, KEY)
    await late.pull(manifest, deadline_s=20)
    assert late.bytes_moved == manifest.size_bytes, "who does not have the base reads the whole"


async def test_engine_shards_are_read_from_the_trainer_ranks_that_have_them(plane):
    """Two trainer ranks split `w` by rows, a third is a replica of the first; two engine ranks split it by columns."""
    full = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    norm = np.arange(8, dtype=np.float32)

    def freeze(rank: int) -> Snapshot:
        box = shard(full.shape, 0, rank, 2)
        local = np.ascontiguousarray(full[within(box, whole(full.shape))])
        shards = [
            Shard("w", "float32", full.shape, box, local.view(np.uint8).reshape(-1)),
            Shard("norm", "float32", (8,), whole((8,)), norm.view(np.uint8)),
        ]
        return Snapshot.freeze_shards("r", 1, shards, lambda name, shape: (1, 2) if name == "w" else ())

    holders = [Holder(KEY, name=f"trainer-{rank}") for rank in (1, 2)]
    for holder in holders:
        await holder.start("127.0.0.1")
    parts = [await holders[0].hold(freeze(1)), await holders[1].hold(freeze(0))]
    manifest = await plane.publisher.publish(freeze(0), "digest-1", parts)
    assert json.loads(manifest.model_dump_json())["sources"][0]["name"] == "trainer"
    for rank in (0, 1):
        want = shard(full.shape, 1, rank, 2)
        engine = Puller(plane.store, KEY, want=lambda entry, w=want: w if entry.name == "w" else whole(entry.shape))
        await engine.pull(manifest, deadline_s=20)
        assert engine.bytes_moved == full.nbytes // 2 + norm.nbytes
        loaded = {entry.name: data.view(np.float32).reshape(entry.shape) for entry, data in engine.tensors(manifest)}
        assert np.array_equal(loaded["w"], full[within(want, whole(full.shape))])
        assert np.array_equal(loaded["norm"], norm)
        await engine.close()
    for holder in holders:
        await holder.close()


async def test_engines_read_from_each_other_and_a_source_has_few_readers_at_a_time(plane, monkeypatch):
    monkeypatch.setattr(puller_module, "READS_PER_SOURCE", 1)
    manifest = only(await plane.publish(1), "tcp")
    engines = [Puller(plane.store, KEY, name=f"engine-{n}", transports=["tcp"]) for n in range(4)]
    for engine in engines:
        await engine.serve("127.0.0.1")
    await engines[0].pull(manifest, deadline_s=20)
    await plane.publisher.close()  # from now on only a relay has it
    await asyncio.gather(*(engine.pull(manifest, deadline_s=20) for engine in engines[1:]))
    for engine in engines:
        assert_has(engine, manifest, 1)
        await engine.close()


async def test_a_relay_that_lies_costs_nothing_but_its_reads(plane):
    manifest = only(await plane.publish(1), "tcp")
    runs = {"beyond": [[0, 99]], "nothing there": [[0, 3]], "no endpoint": [[0, 3]], "other bytes": [[0, 5]]}
    endpoints = {
        "beyond": [{"transport": "tcp"}], "nothing there": [{"transport": "tcp", "address": "127.0.0.1", "port": 1}],
        "no endpoint": [{}], "other bytes": [{"transport": "shared_memory"}],
    }  # fmt: skip
    for name in runs:
        source = {"name": name, "runs": runs[name], "endpoints": endpoints[name]}
        info = {"version": 1, "digest": manifest.digest, "source": source}
        await plane.store.register(RELAYS, name, info, 60)
    await plane.puller.pull(manifest, deadline_s=20)
    assert_has(plane.puller, manifest, 1)


@pytest.mark.skipif(not installed(), reason="NIXL is not installed (postroad[rdma])")
async def test_nixl_follows_from_version_to_version_and_relays(plane):
    publisher = plane.publisher
    publisher._holder._transports = ("nixl",)
    reader, late = (Puller(plane.store, KEY, transports=["nixl"]) for _ in range(2))
    await reader.serve("127.0.0.1")
    for version in (1, 2, 3):
        await plane.publish(version)
        manifest = await reader.current()
        assert await reader.pull(manifest, deadline_s=20) == "nixl"
        assert_has(reader, manifest, version)
    await publisher.close()
    await late.pull(manifest, deadline_s=20)
    assert_has(late, manifest, 3)
    for puller in (reader, late):
        await puller.close()


async def test_training_goes_on_while_a_snapshot_is_read(plane):
    """What is frozen is a copy: the trainer overwrites its parameters during the read, and nobody sees it."""
    parameters = tensors(1)
    manifest = only(await plane.publisher.publish(Snapshot.freeze("r", 1, parameters), "digest-1"), "tcp")
    pulling = asyncio.create_task(plane.puller.pull(manifest, deadline_s=20))
    written = 0
    while not pulling.done():
        for *_, data in parameters:
            data[:] = written % 251
        written += 1
        await asyncio.sleep(0)
    await pulling
    assert written > 1
    assert_has(plane.puller, manifest, 1)
