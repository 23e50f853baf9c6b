"""The weight plane: its transports beside bare ones, what serving loses during a pull, and how a version spreads.

.venv/bin/python benchmarks/weights.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs import report
from weights_fanout import spread_time_s
from weights_links import SIZE_BYTES, Links, measure
from weights_serving import Serving, serve_and_pull

from postroad.supervisor.servers import Server, free_port, nats_server, valkey_server

RATIO, SERVED = 0.8, 0.9
TERABYTE = 10**12
ENGINES = (1, 8, 64, 256, 1024)


@contextmanager
def running(server: Server) -> Iterator[str]:
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        yield server.url
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a shorter time of serving")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rounds, seconds = (3, 10.0) if arguments.quick else (11, 40.0)
    with tempfile.TemporaryDirectory(prefix="postroad-benchmark-") as name:
        folder = Path(name)
        servers = nats_server(folder / "nats", free_port(), "n"), valkey_server(folder / "valkey", free_port(), "v")
        with running(servers[0]) as nats, running(servers[1]) as valkey:
            links = asyncio.run(measure(nats, valkey, rounds))
            serving = asyncio.run(serve_and_pull(nats, valkey, folder, seconds))
    return tell(links, serving, arguments.json)


def tell(links: Links, serving: Serving, as_json: bool) -> int:
    load = os.getloadavg()[0]
    print(
        f"{SIZE_BYTES / 1e6:.0f} MB between two processes, median of {len(links.rates['tcp'])} rounds, load {load:.1f}"
    )
    for name in links.rates:
        print(f"  {name:14s} {links.median(name):5.2f} GB/s")
    print(f"  frozen (copied and checksummed) in {links.freeze_s:.2f} s, in memory that was not there before")
    ratios = {name: links.ratio(*name.split(" of ")) for name in ("tcp of bare tcp", "nixl of bare nixl, shared")}
    private = links.ratio("nixl", "bare nixl, private")
    print(f"  nixl is {private:.2f} of bare NIXL between private memory, which has huge pages")
    figures: dict[str, Any] = {
        "rates_gb_s": {name: links.median(name) for name in links.rates},
        "ratios": ratios | {"nixl of bare nixl, private": private},
        "freeze_s": links.freeze_s,
        "extra_memory_mb": links.growth_bytes / 1e6,
        "serving": serving.figures(),
        "load": load,
    }
    print(f"serving a model of {serving.size_bytes / 1e6:.0f} MB: {serving.alone:.1f} tokens/s, {serving.pulling:.1f} "
          f"with a new version every {serving.every_s:g} s, {serving.during:.1f} while one is pulled")  # fmt: skip
    rate = links.median("tcp") * 1e9
    print(f"1 TB over 64 sources to N engines of 64 ranks, {rate / 1e9:.2f} GB/s a link (simulated):")
    figures["spread_s"] = {}
    for engines in ENGINES:
        relayed, direct = (spread_time_s(TERABYTE, 64, engines, rate, relay=relay) for relay in (True, False))
        figures["spread_s"][engines] = {"relay": relayed, "direct": direct}
        print(f"  {engines:5d} engines  {relayed:7.1f} s with the relay, {direct:7.1f} s without")
    bars = {
        f"{name}: {ratio:.2f} of the bare transport, at least {RATIO}": ratio >= RATIO for name, ratio in ratios.items()
    }
    bars[f"serving: {serving.ratio:.2f} of the throughput without pulls, at least {SERVED}"] = serving.ratio >= SERVED
    extra = links.growth_bytes / 1e6
    bars[f"memory of a reader beside one staged copy: {extra:.0f} MB, at most 27"] = extra <= 27
    return report(figures, bars, as_json)


if __name__ == "__main__":
    raise SystemExit(main())
