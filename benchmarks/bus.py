"""What the road costs: durable trajectories of 32 KiB through publish → consume → publish → acknowledge.

In one run, on one server that syncs every write: the road, bare nats-py doing the same, and Ray's object store with
ray.util.queue, which keeps nothing. Then the memory of client and server over 100,000 small messages.

    .venv/bin/python benchmarks/bus.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from bus_paths import Load, bare, on_the_road
from runs import report

from postroad.bus import Bus
from postroad.supervisor.servers import free_port, nats_server

RAY = "ray==2.60.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "postroad" / "ray-2.60.0"
ARRAY_BYTES = 32 * 1024
SMALL_BYTES = 512
RATE_PER_S, RATIO, CLIENT_GROWTH_BYTES, SERVER_GROWTH_BYTES = 1000, 0.8, 64, 1024


@dataclass
class Memory:
    """Resident memory as messages pass; `growth` is the slope over the second half, in bytes per message."""

    server: psutil.Process
    client: psutil.Process = field(default_factory=psutil.Process)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    every: int = 500

    def watch(self, done: int) -> None:
        if done % self.every == 0:
            self.samples.append((done, self.client.memory_info().rss, self.server.memory_info().rss))

    def growth(self) -> tuple[float, float]:
        done, client, server = np.array(self.samples[len(self.samples) // 2 :], dtype=float).T
        return float(np.polyfit(done, client, 1)[0]), float(np.polyfit(done, server, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer messages, without Ray")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--concurrency", type=int, default=64)
    arguments = parser.parse_args()
    load = Load(1000 if arguments.quick else 4000, arguments.concurrency, ARRAY_BYTES)
    syncs, busy = syncs_per_s(), os.getloadavg()[0]
    with server() as (url, process):
        rates = asyncio.run(durable(url, load, rounds=3 if arguments.quick else 5))
        small = Load(10_000 if arguments.quick else 100_000, arguments.concurrency, SMALL_BYTES)
        memory = asyncio.run(memory_of(url, process, small))
    ray, skipped = (None, "--quick") if arguments.quick else ray_rate(load)
    client, server_growth = memory.growth()
    road, alone = (statistics.median(rate) for rate in rates)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*rates, strict=True))
    print(
        f"{load.count} trajectories of 32 KiB, {load.concurrency} at the same time, medians of {len(rates[0])} rounds"
    )
    print(
        f"  (at the start: load {busy:.1f} on {os.cpu_count()} cores; the disk syncs {syncs:.0f} writes of 32 KiB/s in turn)"
    )
    print(f"  the road (durable)            {road:8.0f}/s   {ratio:.2f} of bare nats-py")
    print(f"  bare nats-py (durable)        {alone:8.0f}/s")
    print(f"  Ray queue (not durable)       {'skipped: ' + skipped if ray is None else f'{ray:8.0f}/s'}")
    print(f"{small.count} trajectories of {SMALL_BYTES} bytes: bytes of memory per message, over the second half")
    _, client_bytes, server_bytes = memory.samples[-1]
    print(
        f"  client {client:7.1f} (of {client_bytes >> 20} MiB)   server {server_growth:7.1f} (of {server_bytes >> 20} MiB)"
    )
    figures = {
        "benchmark": "bus", "road_per_s": road, "bare_per_s": alone, "ratio": ratio, "ray_per_s": ray,
        "ray_skipped": skipped, "client_growth_bytes": client, "server_growth_bytes": server_growth,
        "client_bytes": client_bytes, "disk_syncs_per_s": syncs, "load": busy, "server_bytes": server_bytes,
    }  # fmt: skip
    bars = {
        f"at least {RATE_PER_S} durable trajectories per second": road >= RATE_PER_S,
        f"at least {RATIO} of bare nats-py": ratio >= RATIO,
        f"client grows by less than {CLIENT_GROWTH_BYTES} bytes a message": client < CLIENT_GROWTH_BYTES,
    }
    if not arguments.quick:  # its caches are full only after some ten thousands
        bars[f"server grows by less than {SERVER_GROWTH_BYTES} bytes a message"] = server_growth < SERVER_GROWTH_BYTES
    return report(figures, bars, arguments.json)


@contextmanager
def server() -> Iterator[tuple[str, psutil.Process]]:
    """A nats-server as the supervisor runs it, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="postroad-benchmark-") as folder:
        nats = nats_server(Path(folder), free_port(), "benchmark")
        process = subprocess.Popen(nats.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield nats.url, psutil.Process(process.pid)
        finally:
            process.kill()
            process.wait()


def syncs_per_s(seconds: float = 1.0) -> float:
    """Writes of 32 KiB that this disk syncs one after the other: the machine's weather, to read the rates by."""
    with tempfile.TemporaryFile(buffering=0) as file:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            file.write(bytes(ARRAY_BYTES))
            os.fsync(file.fileno())
            count += 1
        return count / (time.perf_counter() - started)


async def durable(url: str, load: Load, rounds: int) -> tuple[list[float], list[float]]:
    """Trajectories per second (on the road, bare), round by round, one after the other in turn."""
    bus = await Bus.connect(url, "setup")
    await bus.create_streams()
    await bus.close()
    warm_up = Load(max(load.count // 8, 200), load.concurrency, load.array_bytes)
    await on_the_road(url, "warm-road", warm_up)
    await bare(url, "warm-bare", warm_up)
    road, alone = [], []
    for number in range(rounds):
        alone.append(load.count / await bare(url, f"bare-{number}", load))
        road.append(load.count / await on_the_road(url, f"road-{number}", load))
    return road, alone


async def memory_of(url: str, process: psutil.Process, load: Load) -> Memory:
    memory = Memory(process)
    await on_the_road(url, "memory", load, memory.watch)
    return memory


def ray_rate(load: Load) -> tuple[float | None, str]:
    """Trajectories per second with Ray, from a virtual environment that is made once, or why there is no figure."""
    python = CACHE / "bin" / "python"
    try:
        if not (CACHE / "complete").exists():
            venv.create(CACHE, with_pip=True, clear=True)
            subprocess.run(
                [python, "-m", "pip", "install", "-q", RAY, "numpy"], check=True, timeout=600, capture_output=True
            )
            (CACHE / "complete").touch()
        script = Path(__file__).with_name("bus_ray.py")
        sizes = [str(size) for size in (load.count, load.concurrency, load.array_bytes)]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(
            [python, script, *sizes], env=environment, capture_output=True, text=True, timeout=300, check=True
        )
    except subprocess.CalledProcessError as error:
        output = error.stderr.decode() if isinstance(error.stderr, bytes) else str(error.stderr)
        return None, f"Ray failed: {output.strip()[-200:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"Ray can't be installed or run: {error}"
    return float(done.stdout.strip().splitlines()[-1]), ""


if __name__ == "__main__":
    sys.exit(main())
