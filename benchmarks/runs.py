"""Running recipes for benchmarks: by the `postroad` command, as a user would, each run in a temporary folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
POSTROAD = Path(sys.executable).with_name("postroad")


@dataclass(frozen=True)
class Run:
    """A finished run: its last line, its steps, its evaluations, and the seconds it took in all."""

    last_line: str
    steps: list[dict[str, Any]]
    evaluations: dict[str, dict[str, float]]
    audit: dict[str, Any]
    first_step_s: float
    training_s: float


def run(recipe: str, overrides: Sequence[str] = (), *, deadline_s: float = 1800.0) -> Run:
    """Run `recipe` to its end. Raises RuntimeError with the tail of its output where it fails."""
    with tempfile.TemporaryDirectory(prefix="postroad-benchmark-") as folder:
        directory = Path(folder) / "run"
        settings = [argument for override in overrides for argument in ("--set", override)]
        started = time.time()
        done = subprocess.run(
            [POSTROAD, "up", str(ROOT / "recipes" / f"{recipe}.yaml"), "--dir", str(directory), "--no-live", *settings],
            capture_output=True, text=True, timeout=deadline_s,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{recipe} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        steps = [line for line in _json(directory, "steps") if line["step"]]
        status, audit = _json(directory, "status")[0], _json(directory, "audit")[0]
        return Run(
            done.stdout.strip().splitlines()[-1], steps, status.get("evaluations", {}), audit,
            steps[0]["created"] - started, steps[-1]["created"] - steps[0]["created"] + steps[0]["seconds"],
        )  # fmt: skip


def _json(directory: Path, command: str) -> list[Any]:
    text = subprocess.run(
        [POSTROAD, command, "--dir", str(directory), "--json"], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def report(figures: dict[str, Any], bars: dict[str, bool], as_json: bool) -> int:
    """Print the bars, and the figures as the last line where JSON is asked for; the exit code."""
    for bar, met in bars.items():
        print(f"{'met ' if met else 'MISSED'}  {bar}")
    if as_json:
        print(json.dumps({**figures, "bars": bars}))
    return 0 if all(bars.values()) else 1
