"""The mesh with real SGLang and megatron-core on one GPU: reward, agreement of numbers, pauses, kills.

    python3 benchmarks/gpu.py [--recipe gpu-dense] [--kill engine,trainer] [--set trainer.steps=40] [--json]

Kills are SIGKILLs of a process in mid-run, one after the other. docs/gpu.md says what the machine must have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runs import ROOT, report

from postroad.bus import LoggedMessage
from postroad.messages import Event
from postroad.supervisor.folder import RunFolder
from postroad.supervisor.opened import opened

POSTROAD = [sys.executable, "-m", "postroad.command.main"]
WARM_UP = 5
FIRST_STEPS, LAST_STEPS = 5, 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="gpu-dense")
    parser.add_argument("--kill", default="", help="kinds of processes to kill, e.g. engine,trainer")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--deadline-s", type=float, default=420.0)
    parser.add_argument("--logs", type=Path, help="where to copy the ends of the run's logs to")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="postroad-gpu-") as temporary:
        folder = Path(temporary) / "run"
        try:
            return measured(arguments, folder)
        finally:
            if arguments.logs is not None:
                keep_logs(folder / "logs", arguments.logs)


def measured(arguments: argparse.Namespace, folder: Path) -> int:
    kinds = [kind for kind in arguments.kill.split(",") if kind]
    settings = [word for setting in arguments.set for word in ("--set", setting)]
    recipe = str(ROOT / "recipes" / f"{arguments.recipe}.yaml")
    started = time.time()
    up = subprocess.Popen([*POSTROAD, "up", recipe, "--dir", str(folder), "--no-live", *settings])
    try:
        watch(up, folder, kinds, started + arguments.deadline_s)
    finally:
        if up.poll() is None:
            up.send_signal(signal.SIGINT)
            up.wait(60)
    steps = [row for row in lines(folder, "steps") if row["step"]]
    audit = lines(folder, "audit")[0]
    events = asyncio.run(activations(folder))
    return judge(arguments, steps, audit, events, steps[0]["created"] - started)


def watch(up: subprocess.Popen[bytes], folder: Path, kinds: list[str], end: float) -> None:
    """Until the run ends; a process of each of `kinds` is killed some steps after another."""
    due = {WARM_UP + 5 * number: kind for number, kind in enumerate(kinds)}
    while up.poll() is None:
        if time.time() > end:
            raise TimeoutError("the run did not end by the deadline")
        time.sleep(0.3)
        state = folder / "state.json"
        if not (due and state.exists()):
            continue
        step = lines(folder, "status")[0].get("step") or 0
        for number in [number for number in due if step >= number]:
            kind = due.pop(number)
            process = next(row for row in lines(folder, "ps") if row["kind"] == kind)
            print(f"step {step}: kill -9 of {kind}, pid {process['pid']}", flush=True)
            os.kill(process["pid"], signal.SIGKILL)
    if up.returncode:
        raise RuntimeError(f"the run failed with exit code {up.returncode}")


def lines(folder: Path, command: str) -> list[Any]:
    done = subprocess.run(
        [*POSTROAD, command, "--dir", str(folder), "--json"], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    try:
        whole = json.loads(done.stdout)
    except ValueError:
        return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    return whole if isinstance(whole, list) else [whole]


async def activations(folder: Path) -> list[dict[str, Any]]:
    async with opened(RunFolder(folder)) as run:
        return [
            entry.message.fields
            async for entry in run.bus.replay("EVENTS")
            if isinstance(entry, LoggedMessage)
            and isinstance(entry.message, Event)
            and entry.message.name == "activated"
        ]


def judge(arguments: argparse.Namespace, steps: list[Any], audit: Any, events: list[Any], first_step_s: float) -> int:
    measured = steps[WARM_UP:]
    metrics = [step["metrics"] for step in measured]
    difference = statistics.mean(
        step["logprob_abs_diff_mean"] for step in measured if step["logprob_abs_diff_mean"] is not None
    )  # None: all rewards of the step were equal, and nothing was run
    waited = sum(values["seconds_wait"] for values in metrics)
    pauses = [event["pause_ms"] for event in events[2:]] or [float("nan")]
    figures = {
        "benchmark": "gpu", "recipe": arguments.recipe, "steps": len(steps), "first_step_s": round(first_step_s, 1),
        "reward_first": statistics.mean(step["reward_mean"] for step in steps[:FIRST_STEPS]),
        "reward_last": statistics.mean(step["reward_mean"] for step in steps[-LAST_STEPS:]),
        "logprob_abs_diff_mean": difference,
        "experts_differ_fraction": metrics[-1].get("experts_differ_fraction"),
        "step_s": statistics.median(step["seconds"] for step in measured),
        "trainer_idle": waited / sum(step["seconds"] for step in measured),
        "pause_ms_p50": statistics.median(pauses), "pause_ms_max": max(pauses),
        "pull_s_p50": statistics.median([event["pull_s"] for event in events[2:]] or [float("nan")]),
        "weights_bytes": events[-1]["size_bytes"] if events else 0, "activations": len(events),
        "staleness_max": max(step["staleness_max"] for step in steps), **{
            name: audit[name] for name in ("acknowledged", "trained", "lost", "twice", "wrong_version")},
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:28} {value}")
    bars = {
        "at least 30 steps": len(steps) >= 30,
        "reward rises": figures["reward_last"] > 1.5 * max(figures["reward_first"], 1e-3),
        "mean log-probability difference below 0.01": difference < 0.01,
        "pause p50 at most 100 ms": figures["pause_ms_p50"] <= 100,
        "nothing lost": not (audit["lost"] or audit["twice"] or audit["wrong_version"]),
    }
    if not arguments.kill:
        bars["the trainer idles less than 20 % of the time"] = figures["trainer_idle"] < 0.2
    return report(figures, bars, arguments.json)


def keep_logs(source: Path, target: Path, size: int = 60_000) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for log in source.glob("*.log"):
        (target / log.name).write_bytes(log.read_bytes()[-size:])


if __name__ == "__main__":
    sys.exit(main())
