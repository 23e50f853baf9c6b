"""The path of benchmarks/bus.py in two forms: on the road (Bus, Hop, real messages) and on bare nats-py.

Both do the same on the same server: `concurrency` publishers put trajectories on disk while as many handlers take them
off, put a sample on disk for each, and acknowledge. One connection publishes, another one consumes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import nats
import numpy as np
from nats.js.api import AckPolicy, ConsumerConfig

from postroad.bus import Bus, Hop, work
from postroad.messages import Message, RewardSpec, Sample, Sampling, Task, Trajectory, VersionSpan, encode

BYTES_PER_TOKEN = 4 + 1 + 4
DEADLINE_S = 300.0


def trajectory(run: str, number: int, array_bytes: int) -> Trajectory:
    """A trajectory whose arrays take `array_bytes`."""
    tokens = array_bytes // BYTES_PER_TOKEN
    task = Task(
        run=run, id=f"g{number:08d}", prompt=[{"role": "user", "content": "What is 17 * 23?"}], members=1,
        sampling=Sampling(max_new_tokens=tokens), reward=RewardSpec(grader="math", label="391"), row=str(number),
        deadline=time.time() + 600,
    )  # fmt: skip
    mask = np.ones(tokens, dtype=np.uint8)
    mask[: tokens // 4] = 0
    return Trajectory(
        run=run, id=f"{task.id}.0", member=0, task=task, tokens=np.arange(tokens, dtype=np.int32), loss_mask=mask,
        log_probabilities=np.linspace(-3, 0, tokens, dtype=np.float32),
        versions=[VersionSpan(start=0, end=tokens, version=3, digest="0" * 32)],
        messages=[*task.prompt, {"role": "assistant", "content": "It is 391."}], finish_reason="stop",
    )  # fmt: skip


async def spread(numbers: Iterator[int], concurrency: int, publish: Callable[[int], Awaitable[Any]]) -> None:
    async def one() -> None:
        for number in numbers:
            await publish(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one())


@dataclass(frozen=True)
class Load:
    """`count` trajectories whose arrays take `array_bytes`, `concurrency` at the same time on each side."""

    count: int
    concurrency: int
    array_bytes: int


async def on_the_road(url: str, run: str, load: Load, watch: Callable[[int], None] = lambda done: None) -> float:
    """Seconds that the load takes, messages, validation and tracing included. `watch` is told each number done."""
    async with asyncio.timeout(DEADLINE_S):
        sender, receiver = await Bus.connect(url, run), await Bus.connect(url, run)
        await sender.create_streams()
        done, finished, stop = 0, asyncio.Event(), asyncio.Event()
        first = trajectory(run, 0, load.array_bytes)

        async def grade(message: Message) -> None:
            nonlocal done
            assert isinstance(message, Trajectory)
            sample = Sample(run=run, id=message.id, trajectory=message, reward=1.0)
            await receiver.publish(receiver.subjects.sample(message.group, message.member), sample, once=True)
            done += 1
            watch(done)
            if done == load.count:
                finished.set()

        async def publish(number: int) -> None:
            group = f"g{number:08d}"
            task = first.task.model_copy(update={"id": group})
            sent = first.model_copy(update={"id": f"{group}.0", "task": task})
            await sender.publish(sender.subjects.trajectory(sent.group, 0), sent)

        started = time.perf_counter()
        hop = Hop("TRAJECTORIES", "benchmark", "trajectory", grade, load.concurrency)
        working = asyncio.create_task(work(receiver, hop, stop))
        await spread(iter(range(load.count)), load.concurrency, publish)
        await finished.wait()
        stop.set()
        await working
        seconds = time.perf_counter() - started
        assert hop.counts == {"done": load.count}, hop.counts
        await sender.close()
        await receiver.close()
        return seconds


async def bare(url: str, run: str, load: Load) -> float:
    """Seconds that as many payloads of the same size take on nats-py alone: bytes in, the same bytes out."""
    payload = encode(trajectory(run, 0, load.array_bytes))
    async with asyncio.timeout(DEADLINE_S):
        sender, receiver = await nats.connect(url), await nats.connect(url)
        outgoing, incoming = sender.jetstream(), receiver.jetstream()
        slots, taken = asyncio.Semaphore(load.concurrency), 0

        async def publish(number: int) -> None:
            subject = f"trajectory.{run}.g{number:08d}.0"
            await outgoing.publish(subject, payload, headers={"Nats-Msg-Id": subject})

        async def handle(message: Any) -> None:
            subject = message.subject.replace("trajectory", "sample", 1)
            headers = {"Nats-Msg-Id": subject, "Nats-Expected-Last-Subject-Sequence": "0"}
            await incoming.publish(subject, message.data, headers=headers)
            await message.ack_sync()
            slots.release()

        started = time.perf_counter()
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, ack_wait=30, max_ack_pending=10_000)
        subscription = await incoming.pull_subscribe(
            f"trajectory.{run}.>", f"bare-{run}", "TRAJECTORIES", config=config
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(spread(iter(range(load.count)), load.concurrency, publish))
            while taken < load.count:
                free = await take_all(slots)
                messages = await subscription.fetch(min(free, load.count - taken), timeout=5)
                taken += len(messages)
                for message in messages:
                    group.create_task(handle(message))
                for _ in range(free - len(messages)):
                    slots.release()
        seconds = time.perf_counter() - started
        await sender.close()
        await receiver.close()
        return seconds


async def take_all(slots: asyncio.Semaphore) -> int:
    """Take every free slot, at least one; their number."""
    await slots.acquire()
    taken = 1
    while not slots.locked():
        await slots.acquire()
        taken += 1
    return taken
