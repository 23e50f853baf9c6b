"""Users' functions for the tests: good ones and bad ones. They run in the graders' processes."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NOT_A_FUNCTION = 3


def length(response: str) -> float:
    return float(len(response))


async def everything(
    prompt: list[dict[str, Any]], response: str, label: Any, metadata: dict[str, Any]
) -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"reward": float(response == label), "turns": len(prompt), "metrics": {"bonus": metadata["bonus"]}}


def by_keywords(**arguments: Any) -> int:
    return len(arguments)


def raises(response: str) -> float:
    raise LookupError(f"no rule for {response!r}")


def raises_once(metadata: dict[str, Any]) -> float:
    marker = Path(metadata["marker"])
    if not marker.exists():
        marker.touch()
        raise ConnectionError("the judge hung up")
    return 1.0


def not_a_number() -> float:
    return math.nan


def a_word() -> str:
    return "good"


def hangs() -> float:
    return float(len(str(9**9**9**9)))


def hangs_on_request(response: str) -> float:
    return hangs() if response == "hang" else 1.0


def dies() -> float:
    os._exit(7)


def eats_memory() -> float:
    return float(len(bytearray(64 << 30)))


def chatters(response: str) -> float:
    print("to the standard output")
    os.write(1, b"and past Python's buffer")
    assert sys.stdin.read() == ""
    return 1.0


def leaves_a_child_behind(metadata: dict[str, Any]) -> float:
    child = subprocess.Popen(["sleep", "600"])
    Path(metadata["marker"]).write_text(str(child.pid))
    time.sleep(600)
    return 0.0


def slow(response: str, metadata: dict[str, Any]) -> float:
    with Path(metadata["journal"]).open("a") as journal:
        journal.write(f"{response}\n")
    time.sleep(metadata["seconds"])
    return 0.5


def slow_once(response: str, metadata: dict[str, Any]) -> float:
    with Path(metadata["journal"]).open("a") as journal:
        journal.write(f"{response}\n")
    first = Path(metadata["journal"]).read_text().split().count(response) == 1
    time.sleep(metadata["seconds"] if first else 0)
    return 0.5


def ranks(responses: list[str], metadata: dict[str, Any]) -> list[float]:
    if journal := metadata.get("journal"):
        with Path(journal).open("a") as file:
            file.write(f"{len(responses)}\n")
    return [float(sorted(responses, key=len).index(response)) for response in responses]


async def too_few(responses: list[str]) -> list[float]:
    return [0.0]


def raises_until(metadata: dict[str, Any]) -> float:
    if not Path(metadata["marker"]).exists():
        raise LookupError("not yet")
    return 1.0
