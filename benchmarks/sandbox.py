"""What isolation costs: print(1) in the warm sandbox, in a cold `bwrap python3`, and in a plain subprocess.

Each way one run after another (latency to the output) and two at once (runs a second), in turns; then 10,000 runs in the
warm sandbox, whose processes' memory is compared before and after, and whether a process is left when it is closed.

    .venv/bin/python benchmarks/sandbox.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from runs import report

from postroad_reward.sandbox import Job, Sandbox
from postroad_reward.sandbox import root as sandbox_root
from postroad_reward.sandbox.processes import descendants, memory_bytes

CODE = "print(1)"
ROUNDS = 3
GROWTH_BYTES = 4 << 20
Way = Callable[[], Awaitable[str]]


def started(*command: str) -> Way:
    async def run() -> str:
        process = await asyncio.create_subprocess_exec(*command, CODE, stdout=-1, stderr=-1)
        output, error = await process.communicate()
        if process.returncode:
            raise RuntimeError(error.decode())
        return output.decode()

    return run


async def one_after_another(way: Way, seconds: float) -> list[float]:
    """Milliseconds of each run."""
    times, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        assert await way() == "1\n"
        times.append((time.perf_counter() - begin) * 1e3)
    return times


async def at_once(way: Way, seconds: float) -> float:
    """Runs a second, two at a time."""
    begin = time.perf_counter()
    times = await asyncio.gather(one_after_another(way, seconds), one_after_another(way, seconds))
    return sum(map(len, times)) / (time.perf_counter() - begin)


def processor_s() -> float:
    """Processor time of this process, of those that have ended, and of the sandboxes."""
    total = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for pid in descendants(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


async def soak(way: Way, runs: int) -> tuple[int, int]:
    """Memory of the sandboxes and of this process before and after, in bytes."""

    async def used() -> int:
        await asyncio.sleep(0.5)  # until the next interpreters are forked
        return memory_bytes([os.getpid(), *descendants(os.getpid())])

    for _ in range(200):
        await way()
    before = await used()
    for _ in range(runs // 2):
        await asyncio.gather(way(), way())
    return before, await used()


async def measure(quick: bool) -> tuple[dict[str, float], int, int, int]:
    sandbox = Sandbox(size=2)
    begin = time.perf_counter()
    await sandbox.start()
    figures = {"start_s": time.perf_counter() - begin}

    async def warm() -> str:
        return (await sandbox.run(Job(CODE))).stdout

    ways = {"warm": warm, "cold": started(*sandbox_root.command(())), "plain": started(sys.executable, "-c")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            before_s = processor_s()
            some = await one_after_another(way, 0.5 if quick else 3)
            spent[name].append((processor_s() - before_s) / len(some) * 1e3)
            times[name] += some
            rates[name].append(await at_once(way, 0.5 if quick else 3))
    for name in ways:
        cuts = statistics.quantiles(times[name], n=100)
        figures |= {
            f"{name}_p50_ms": cuts[49],
            f"{name}_p99_ms": cuts[98],
            f"{name}_per_s": statistics.median(rates[name]),
        }
    figures |= {f"{name}_processor_ms": statistics.median(spent[name]) for name in ways}
    before, after = await soak(warm, 500 if quick else 10_000)
    await sandbox.close()
    return figures, before, after, len(descendants(os.getpid()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures, before, after, left = asyncio.run(measure(arguments.quick))
    print(f"{'':8}{'p50 ms':>8}{'p99 ms':>8}{'runs/s':>8}{'processor ms a run':>20}")
    for name in ("warm", "cold", "plain"):
        print(
            f"{name:8}"
            + "".join(f"{figures[f'{name}_{what}']:8.1f}" for what in ("p50_ms", "p99_ms", "per_s"))
            + f"{figures[f'{name}_processor_ms']:20.1f}"
        )
    print(
        f"two sandboxes ready after {figures['start_s']:.2f} s; memory {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB"
    )
    bars = {
        "warm p50 at most 10 ms": figures["warm_p50_ms"] <= 10, "warm p99 at most 50 ms": figures["warm_p99_ms"] <= 50,
        "at least 150 runs a second, two at once": figures["warm_per_s"] >= 150,
        "memory flat (4 MB)": after - before <= GROWTH_BYTES, "no process is left": left == 0,
    }  # fmt: skip
    all_figures = {"benchmark": "sandbox", **figures, "memory_before_bytes": before, "memory_after_bytes": after}
    return report(all_figures, bars, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
