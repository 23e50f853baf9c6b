"""A stand-in for any service: it registers and lives. `python stand_in.py KIND [EXIT_CODE]`; with a code it ends at once.

The trainer logs steps and ends with 0 once there is a file `finish` in the run's folder. Each writes its pid into
`pids`, so that a test can see that nothing is left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from postroad.bus import AlreadyPublished, Bus
from postroad.config import Environment
from postroad.messages import Step
from postroad.store import Store
from postroad.supervisor.processes import die_with_parent

STEPS = 3


async def main(kind: str) -> None:
    environment = Environment.read()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    store = await Store.connect(environment.redis_url, environment.run)
    if kind == "trainer":
        await log_steps(environment)
    while not stop.is_set():
        await store.register(kind, environment.name, {"pid": os.getpid(), "version": 0}, 5.0)
        if kind == "trainer" and (environment.folder / "finish").exists():
            return
        try:
            await asyncio.wait_for(stop.wait(), 0.1)
        except TimeoutError:
            continue


async def log_steps(environment: Environment) -> None:
    bus = await Bus.connect(environment.nats_url, environment.run)
    for number in range(STEPS + 1):
        step = Step(
            run=environment.run, id=str(number), number=number, version=number, digest=f"d{number}", sequences=[],
            samples=[], groups=[], staleness_max=min(number, 1), metrics={"reward_mean": number / 10},
        )  # fmt: skip
        try:
            await bus.publish(bus.subjects.step(number), step, once=True)
        except AlreadyPublished:
            continue
    await bus.close()


if __name__ == "__main__":
    die_with_parent()
    with (Environment.read().folder / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if len(sys.argv) > 2:
        print(f"this {sys.argv[1]} is broken", flush=True)
        sys.exit(int(sys.argv[2]))
    asyncio.run(main(sys.argv[1]))
