"""Metadata on a real Valkey: compare-and-set, leases with fencing, registries; over a killed server."""

from __future__ import annotations

import asyncio

import pytest

from postroad.store import LeaseLost, Store, StoreConflict, StoreError


@pytest.fixture
async def store(valkey):
    store = await Store.connect(valkey.url, "r")
    yield store
    await store.close()


async def test_compare_and_set_refuses_a_stale_writer(store):
    await store.compare_and_set("w", "", "1", {"a": 1})
    with pytest.raises(StoreConflict, match="at version 1"):
        await store.compare_and_set("w", "", "2", {"a": 2})
    await store.compare_and_set("w", "1", "2", {"a": 2})
    assert await store.versioned("w") == ("2", {"a": 2})


async def test_a_lease_has_one_holder_and_growing_tokens(store):
    first = await store.acquire("trainer", "a", ttl_s=0.3)
    assert (await store.acquire("trainer", "a", ttl_s=0.3)).token == first.token
    with pytest.raises(LeaseLost):
        await store.acquire("trainer", "b", ttl_s=1)
    async with asyncio.timeout(5):
        while True:
            try:
                second = await store.acquire("trainer", "b", ttl_s=5)
                break
            except LeaseLost:
                await asyncio.sleep(0.05)
    assert second.token > first.token
    await store.set_fenced(second, "cursor", 7)
    with pytest.raises(LeaseLost):
        await store.set_fenced(first, "cursor", 3)
    assert await store.get("cursor") == 7


async def test_a_registration_runs_out(store):
    await store.register("engine", "e0", {"url": "x"}, ttl_s=0.2)
    await store.register("engine", "e1", {"url": "y"}, ttl_s=30)
    async with asyncio.timeout(5):
        while "e0" in await store.members("engine"):
            await asyncio.sleep(0.02)
    assert await store.members("engine") == {"e1": {"url": "y"}}
    await store.leave("engine", "e1")
    assert await store.members("engine") == {}


async def test_acknowledged_writes_survive_a_killed_server(store, valkey):
    for number in range(50):
        await store.set(f"k{number}", number)
    valkey.kill()
    reading = asyncio.create_task(store.get("k49"))
    await asyncio.to_thread(valkey.start)
    assert await asyncio.wait_for(reading, 30) == 49
    assert [await store.get(f"k{number}") for number in range(50)] == list(range(50))


async def test_a_wrong_password_is_explained(valkey):
    with pytest.raises(StoreError, match="another run"):
        await Store.connect(valkey.url.replace("valkey-secret", "wrong"), "r", deadline_s=5)


async def test_many_at_a_time_share_the_connections(valkey):
    store = await Store.connect(valkey.url, "many")
    await asyncio.gather(*(store.set(f"d{number}", number) for number in range(1000)))
    assert await asyncio.gather(*(store.get(f"d{number}") for number in range(1000))) == list(range(1000))
    await store.close()
