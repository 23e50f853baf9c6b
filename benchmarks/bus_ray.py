"""benchmarks/bus.py's path with Ray's object store and ray.util.queue, without durability. Runs in Ray's own venv.

python bus_ray.py COUNT CONCURRENCY ARRAY_BYTES   # the last line is trajectories per second
"""

from __future__ import annotations

import asyncio
import sys
import time

import numpy as np
import ray
from ray.util.queue import Queue


def trajectory(number: int, array_bytes: int) -> dict[str, object]:
    tokens = array_bytes // 9
    return {
        "id": f"g{number:08d}.0", "prompt": "What is 17 * 23?", "response": "It is 391.", "version": 3,
        "tokens": np.arange(tokens, dtype=np.int32), "loss_mask": np.ones(tokens, dtype=np.uint8),
        "log_probabilities": np.linspace(-3, 0, tokens, dtype=np.float32),
    }  # fmt: skip


async def path(count: int, concurrency: int, array_bytes: int) -> float:
    """Trajectories per second from one queue to the other. Objects go by reference, one per message."""
    trajectories, samples = Queue(), Queue()
    numbers = iter(range(count))
    left = iter(range(count))

    async def produce() -> None:
        for number in numbers:
            await trajectories.put_async([ray.put(trajectory(number, array_bytes))])

    async def grade() -> None:
        for _ in left:
            (reference,) = await trajectories.get_async()
            await samples.put_async([ray.put({"trajectory": await reference, "reward": 1.0})])

    started = time.perf_counter()
    await asyncio.gather(*(produce() for _ in range(concurrency)), *(grade() for _ in range(concurrency)))
    seconds = time.perf_counter() - started
    assert samples.qsize() == count
    return count / seconds


def main() -> None:
    count, concurrency, array_bytes = map(int, sys.argv[1:4])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    asyncio.run(path(count // 10, concurrency, array_bytes))  # actors start
    print(asyncio.run(path(count, concurrency, array_bytes)))


if __name__ == "__main__":
    main()
