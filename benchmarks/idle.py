"""What does a mesh cost that has nothing to do? Processor time and memory of every process beside the engine.

The reward service is stopped (SIGSTOP) in mid-run: the trainer waits for samples, and all others have done their work.
What the reward service itself takes is measured with the engine stopped in its place.

    .venv/bin/python benchmarks/idle.py [--seconds 30] [--json]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from runs import POSTROAD, ROOT, report

SETTLE_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="postroad-idle-") as temporary:
        folder = Path(temporary) / "run"
        recipe = str(ROOT / "recipes" / "tiny.yaml")
        settings = ["--set", "trainer.steps=100000", "--set", "rollout.deadline_s=3600"]
        subprocess.run([POSTROAD, "up", recipe, "--dir", str(folder), "--detach", *settings], check=True, timeout=180)
        try:
            return measure(folder, arguments)
        finally:
            subprocess.run([POSTROAD, "down", "--dir", str(folder)], timeout=120)


def measure(folder: Path, arguments: argparse.Namespace) -> int:
    ps = subprocess.run([POSTROAD, "ps", "--dir", str(folder), "--json"], capture_output=True, check=True, timeout=60)
    pids = {row["kind"]: row["pid"] for row in json.loads(ps.stdout)}
    pids["supervisor"] = int(psutil.Process(pids["router"]).ppid())
    engine = pids.pop("engine")
    trees = {kind: [psutil.Process(pid)] for kind, pid in pids.items()}
    for kind in ("trainer", "reward", "worker"):
        trees[kind] += trees[kind][0].children(recursive=True)
    shares = {"reward": stopped([psutil.Process(engine)], {"reward": trees["reward"]}, arguments.seconds)["reward"]}
    shares |= stopped(trees["reward"], {kind: trees[kind] for kind in trees if kind != "reward"}, arguments.seconds)
    memory = {kind: sum(process.memory_full_info().pss for process in tree) for kind, tree in trees.items()}
    for kind in trees:
        print(f"{kind:12} {100 * shares[kind]:6.2f} % of a core {memory[kind] / 2**20:8.0f} MiB")
    core, size = sum(shares.values()), sum(memory.values())
    print(f"{'all':12} {100 * core:6.2f} % of a core {size / 2**20:8.0f} MiB")
    figures = {"benchmark": "idle", "core_share": core, "memory_bytes": size, "shares": shares, "memory": memory}
    bars = {
        "less than 3 % of a core beside the engine": core < 0.03,
        "less than 1.5 GiB beside models": size < 1.5 * 2**30,
    }
    return report(figures, bars, arguments.json)


def stopped(others: list[psutil.Process], trees: dict[str, list[psutil.Process]], seconds: float) -> dict[str, float]:
    """Seconds of processor time per second of each of `trees` while `others` stand still."""
    for process in others:
        process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(SETTLE_S)
        before = {kind: sum(map(seconds_of, tree)) for kind, tree in trees.items()}
        time.sleep(seconds)
        return {kind: (sum(map(seconds_of, tree)) - before[kind]) / seconds for kind, tree in trees.items()}
    finally:
        for process in others:
            process.send_signal(signal.SIGCONT)


def seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    sys.exit(main())
