"""The road on a real nats-server: durable, once only, over restarts."""

from __future__ import annotations

import asyncio

import pytest

from postroad.bus import AlreadyPublished, Bus, BusError, Hop, Reject, RetryLater, work
from postroad.messages import DeadLetter, Event, Message


def event(number: int, size: int = 0, run: str = "r") -> Event:
    return Event(run=run, id=str(number), service="test", name="n", fields={"number": number, "pad": "x" * size})


@pytest.fixture
async def bus(nats):
    bus = await Bus.connect(nats.url, "r")
    await bus.create_streams()
    yield bus
    await bus.close()


async def collect(bus, stream, **keywords):
    return [logged async for logged in bus.replay(stream, **keywords)]


async def test_published_messages_are_replayed_in_order(bus):
    sequences = [await bus.publish(bus.subjects.event("a"), event(number)) for number in range(20)]
    logged = await collect(bus, "EVENTS", start=sequences[5])
    assert [entry.sequence for entry in logged] == sequences[5:]
    assert [entry.message.fields["number"] for entry in logged] == list(range(5, 20))


async def test_same_message_id_is_stored_once(bus):
    first = await bus.publish(bus.subjects.event("a"), event(1))
    assert await bus.publish(bus.subjects.event("a"), event(1)) == first
    assert len(await collect(bus, "EVENTS")) == 1


async def test_once_refuses_a_second_message_on_the_subject(bus):
    await bus.publish(bus.subjects.sample("g1", 0), event(1), once=True)
    with pytest.raises(AlreadyPublished):
        await bus.publish(bus.subjects.sample("g1", 0), event(2), once=True)
    await bus.publish(bus.subjects.sample("g1", 1), event(3), once=True)


@pytest.mark.parametrize("size", [300_000, 3_000_000])
async def test_large_payload_travels_by_claim_check(bus, size):
    sequence = await bus.publish(bus.subjects.event("a"), event(1, size))
    assert len((await bus.get("EVENTS", sequence)).message.fields["pad"]) == size
    assert await bus.last_sequence("BLOBS") == -(-size // (512 * 1024)) or await bus.last_sequence("BLOBS") > 0


async def test_message_of_another_run_is_refused(bus):
    with pytest.raises(BusError, match="run 'other'"):
        await bus.publish(bus.subjects.event("a"), event(1, run="other"))


async def test_wrong_credentials_are_explained(nats):
    with pytest.raises(BusError, match="another run"):
        await Bus.connect(nats.url.replace("nats-secret", "wrong"), "r", deadline_s=5)


async def test_publishing_survives_a_killed_server(bus, nats):
    await bus.publish(bus.subjects.event("a"), event(0))
    nats.kill()
    pending = asyncio.create_task(bus.publish(bus.subjects.event("a"), event(1)))
    await asyncio.sleep(0.3)
    assert not pending.done()
    await asyncio.to_thread(nats.start)
    assert await asyncio.wait_for(pending, 30) == 2
    assert [entry.message.fields["number"] for entry in await collect(bus, "EVENTS")] == [0, 1]


async def run_hop(bus, handler, until, **keywords):
    stop = asyncio.Event()
    hop = Hop("TRAJECTORIES", "test", "trajectory", handler, concurrency=4, ack_wait_s=1.0, **keywords)
    working = asyncio.create_task(work(bus, hop, stop))
    try:
        async with asyncio.timeout(40):
            while not until(hop):
                await asyncio.sleep(0.02)
    finally:
        stop.set()
        await asyncio.wait_for(working, 20)
    return hop


async def test_work_is_acknowledged_once_and_retried_until_it_succeeds(bus):
    for number in range(6):
        await bus.publish(bus.subjects.trajectory("g", number), event(number))
    seen: list[int] = []

    async def handler(message: Message) -> None:
        seen.append(message.fields["number"])
        if message.fields["number"] == 3 and seen.count(3) < 3:
            raise RetryLater("timeout", "no answer")

    hop = await run_hop(bus, handler, lambda hop: hop.counts.get("done", 0) == 6)
    assert sorted(seen) == [0, 1, 2, 3, 3, 3, 4, 5]
    assert hop.counts["retry_timeout"] == 2


async def test_rejected_exhausted_and_garbage_messages_go_to_dead_intact(bus):
    await bus.publish(bus.subjects.trajectory("g", 0), event(0))
    await bus.publish(bus.subjects.trajectory("g", 1), event(1))
    await bus.jetstream.publish(bus.subjects.trajectory("g", 2), b"garbage")

    async def handler(message: Message) -> None:
        if message.fields["number"] == 0:
            raise Reject("invalid_answer", "no")
        raise RetryLater("judge_unavailable", "gone")

    await run_hop(
        bus, handler, lambda hop: sum(v for k, v in hop.counts.items() if k.startswith("dead")) == 3, deliveries=2
    )
    letters = {entry.message.member: entry.message for entry in await collect(bus, "DEAD")}
    assert {member: letter.reason for member, letter in letters.items()} == {
        0: "invalid_answer", 1: "judge_unavailable", 2: "invalid_message"
    }  # fmt: skip
    assert isinstance(letters[2], DeadLetter) and letters[2].payload == b"garbage"


async def test_long_work_is_not_redelivered(bus):
    await bus.publish(bus.subjects.trajectory("g", 0), event(0))
    calls = 0

    async def handler(message: Message) -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(2.5)  # longer than ack_wait_s

    await run_hop(bus, handler, lambda hop: hop.counts.get("done", 0) == 1)
    assert calls == 1


async def test_hop_and_replay_go_on_after_the_server_was_killed(bus, nats):
    done: list[int] = []

    async def handler(message: Message) -> None:
        done.append(message.fields["number"])

    async def feed() -> None:
        for number in range(30):
            await bus.publish(bus.subjects.trajectory("g", number), event(number))
            if number == 10:
                nats.kill()
                await asyncio.to_thread(nats.start)

    async def follow() -> list[int]:
        numbers = []
        async for entry in bus.replay("TRAJECTORIES", follow=True):
            if entry is not None:
                numbers.append(entry.message.fields["number"])
                if len(numbers) == 30:
                    return numbers
        return numbers

    feeding, following = asyncio.create_task(feed()), asyncio.create_task(follow())
    await run_hop(bus, handler, lambda hop: len(set(done)) == 30)
    await feeding
    assert await asyncio.wait_for(following, 30) == list(range(30))


async def test_slow_work_takes_its_slots_and_no_others(bus):
    for number in range(20):
        await bus.publish(bus.subjects.trajectory("g", number), event(number))
    release, in_hand, most = asyncio.Event(), 0, 0

    async def handler(message: Message) -> None:
        nonlocal in_hand, most
        in_hand, most = in_hand + 1, max(most, in_hand + 1)
        if message.fields["number"] < 3:
            await release.wait()
        in_hand -= 1

    def quick_done(hop: Hop) -> bool:
        if hop.counts.get("done", 0) == 17:
            release.set()
        return hop.counts.get("done", 0) == 20

    await run_hop(bus, handler, quick_done)
    assert most == 4


async def test_a_stopped_hop_leaves_the_rest_to_another_at_once(bus):
    for number in range(40):
        await bus.publish(bus.subjects.trajectory("g", number), event(number))
    seen: list[int] = []

    async def handler(message: Message) -> None:
        seen.append(message.fields["number"])
        await asyncio.sleep(0.01)

    await run_hop(bus, handler, lambda hop: hop.counts.get("done", 0) >= 5)
    started = asyncio.get_running_loop().time()
    await run_hop(bus, handler, lambda hop: len(seen) == 40)
    assert sorted(seen) == list(range(40))
    assert asyncio.get_running_loop().time() - started < 5


async def test_two_hops_of_one_name_share_the_work(bus, nats):
    other = await Bus.connect(nats.url, "r")
    for number in range(40):
        await bus.publish(bus.subjects.trajectory("g", number), event(number))
    seen: dict[str, list[int]] = {"here": [], "there": []}

    def handler(place: str):
        async def handle(message: Message) -> None:
            seen[place].append(message.fields["number"])
            await asyncio.sleep(0.05)

        return handle

    def all_seen(hop: Hop) -> bool:
        return sum(map(len, seen.values())) == 40

    await asyncio.gather(run_hop(bus, handler("here"), all_seen), run_hop(other, handler("there"), all_seen))
    await other.close()
    assert sorted(seen["here"] + seen["there"]) == list(range(40)) and min(map(len, seen.values())) >= 8
