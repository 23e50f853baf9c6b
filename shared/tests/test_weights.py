"""The weight plane between two processes' worth of objects, on a real store: verified or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from postroad.bus import Bus
from postroad.store import Store
from postroad.weights import Manifest, Publisher, Puller, Snapshot, WeightsError

KEY = "mesh-key"


def tensors(seed: int) -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    generator = np.random.default_rng(seed)
    shapes = {"embedding": (1000, 64), "layer.weight": (3000, 3000), "norm": (7,)}
    return [
        (n, "float32", s, generator.random(s, dtype=np.float32).view(np.uint8).reshape(-1)) for n, s in shapes.items()
    ]


@pytest.fixture
async def plane(nats, valkey):
    bus, store = await Bus.connect(nats.url, "r"), await Store.connect(valkey.url, "r")
    publisher = Publisher(bus, store, KEY)
    await publisher.start()
    yield publisher, Puller(store, KEY), store
    await publisher.close()
    await store.close()
    await bus.close()


def only(manifest: Manifest, transport: str) -> Manifest:
    return manifest.model_copy(update={"endpoints": [e for e in manifest.endpoints if e["transport"] == transport]})


@pytest.mark.parametrize("transport", ["shared_memory", "tcp"])
async def test_a_pulled_version_is_the_published_one(plane, transport):
    publisher, puller, _ = plane
    await publisher.publish(Snapshot.freeze("r", 1, tensors(1)), "digest-1")
    manifest = only(await puller.current(), transport)
    assert await puller.pull(manifest, deadline_s=20) == transport
    for (entry, data), (name, _, shape, expected) in zip(puller.tensors(manifest), tensors(1), strict=True):
        assert (entry.name, entry.shape) == (name, shape)
        assert np.array_equal(data, expected)


async def test_a_flipped_byte_is_never_handed_out(plane):
    publisher, puller, _ = plane
    snapshot = Snapshot.freeze("r", 1, tensors(1))
    manifest = await publisher.publish(snapshot, "digest-1")
    snapshot.image[20_000_000] ^= 1
    with pytest.raises(WeightsError, match="bucket 1 does not have its checksum"):
        await puller.pull(manifest, deadline_s=20)


async def test_versions_never_go_back_and_have_one_content(plane):
    publisher, _, _ = plane
    await publisher.publish(Snapshot.freeze("r", 3, tensors(3)), "digest-3")
    with pytest.raises(WeightsError, match="older than the published 3"):
        await publisher.publish(Snapshot.freeze("r", 2, tensors(2)), "digest-2")
    with pytest.raises(WeightsError, match="did not repeat it"):
        await publisher.publish(Snapshot.freeze("r", 3, tensors(4)), "digest-4")
    await publisher.publish(Snapshot.freeze("r", 3, tensors(3)), "digest-3")


async def test_old_snapshots_are_released_and_their_readers_told(plane):
    publisher, puller, _ = plane
    first = await publisher.publish(Snapshot.freeze("r", 1, tensors(1)), "d1")
    for version in (2, 3):
        await publisher.publish(Snapshot.freeze("r", version, tensors(version)), f"d{version}")
    with pytest.raises(WeightsError, match="released"):
        await puller.pull(first, deadline_s=20)


async def test_a_wrong_key_reads_nothing(plane):
    publisher, _, store = plane
    manifest = await publisher.publish(Snapshot.freeze("r", 1, tensors(1)), "d1")
    with pytest.raises(WeightsError, match="the key is wrong"):
        await Puller(store, "guess").pull(only(manifest, "tcp"), deadline_s=20)


async def test_a_dead_source_ends_in_an_error_not_a_hang(plane):
    publisher, puller, _ = plane
    manifest = await publisher.publish(Snapshot.freeze("r", 1, tensors(1)), "d1")
    await publisher.close()
    with pytest.raises(WeightsError, match="could not be read"):
        await puller.pull(manifest, deadline_s=20)
