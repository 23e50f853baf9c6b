"""The launcher: ranks know their place, a failure is passed on, nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from postroad_trainer.launch import launch

SELF = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
(folder / f"{os.environ['RANK']}.writing").write_text(json.dumps({**{n: os.environ[n] for n in names}, "pid": os.getpid()}))
(folder / f"{os.environ['RANK']}.writing").rename(folder / f"{os.environ['RANK']}.json")
"""
DEADLINE_S = 30


def _command(tmp_path: Path, then: str = "") -> list[str]:
    return [sys.executable, "-c", SELF + then, str(tmp_path)]


def _told(tmp_path: Path, ranks: int) -> list[dict[str, str]]:
    """What every rank wrote, once all have."""
    deadline = time.monotonic() + DEADLINE_S
    paths = [tmp_path / f"{rank}.json" for rank in range(ranks)]
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.01)
    return [json.loads(path.read_text()) for path in paths]


def _gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.01)


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    assert launch(_command(tmp_path), 3) == 0
    told = _told(tmp_path, 3)
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in told] == [
        (str(number), str(number), "3") for number in range(3)
    ]
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in told}) == 1


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_first_failure_is_passed_on_and_takes_the_others_along(tmp_path: Path, end: str, code: int) -> None:
    then = f"""
while not (folder / "0.json").exists(): time.sleep(0.01)
if os.environ["RANK"] == "1": {end}
time.sleep(600)
"""
    assert launch(_command(tmp_path, then), 2) == code
    _gone(int(_told(tmp_path, 1)[0]["pid"]))


def _launcher(tmp_path: Path, then: str) -> subprocess.Popen[bytes]:
    command = _command(tmp_path, then)
    code = f"import sys; from postroad_trainer.launch import launch; sys.exit(launch({command!r}, 2))"
    return subprocess.Popen([sys.executable, "-c", code])


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    launcher = _launcher(tmp_path, "time.sleep(600)")
    told = _told(tmp_path, 2)
    launcher.kill()
    assert launcher.wait(DEADLINE_S) == -signal.SIGKILL
    for rank in told:
        _gone(int(rank["pid"]))


def test_a_signal_reaches_the_ranks(tmp_path: Path) -> None:
    launcher = _launcher(tmp_path, "time.sleep(600)")
    _told(tmp_path, 2)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(DEADLINE_S) == 128 + signal.SIGTERM
