"""A whole mesh in a folder of its own, driven as a user drives it: by the `postroad` command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib hides the modules beside the tests

ROOT = Path(__file__).parents[1]
POSTROAD = Path(sys.executable).with_name("postroad")


@dataclass
class Mesh:
    """One embedded run. Everything it started is gone when the test ends."""

    folder: Path
    output: list[str] = field(default_factory=list)

    def command(self, *arguments: str, check: bool = True, timeout_s: float = 120.0) -> str:
        done = subprocess.run(
            [POSTROAD, *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env={**os.environ}
        )
        if check:
            assert done.returncode == 0, f"postroad {' '.join(arguments)}: {done.stderr or done.stdout}\n{self.logs()}"
        return done.stdout

    def up(self, recipe: str = "tiny", *overrides: str, check: bool = True) -> str:
        settings = [argument for override in overrides for argument in ("--set", override)]
        path = str(ROOT / "recipes" / f"{recipe}.yaml")
        return self.command("up", path, "--dir", str(self.folder), "--detach", *settings, check=check, timeout_s=300)

    def down(self) -> None:
        self.command("down", "--dir", str(self.folder), check=False)

    def json(self, command: str, *arguments: str) -> Any:
        return json.loads(self.command(command, "--dir", str(self.folder), "--json", *arguments))

    def lines(self, command: str, *arguments: str) -> list[dict[str, Any]]:
        text = self.command(command, "--dir", str(self.folder), "--json", *arguments, timeout_s=600)
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    def read_state(self) -> dict[str, Any]:
        """state.json, as the supervisor writes it: faster than the command, which some waits are too slow with."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def step(self) -> int:
        return int(self.read_state()["progress"]["step"] or 0)

    def kill(self, kind: str) -> None:
        """SIGKILL to the process of this kind; it must be there."""
        pids = [p["pid"] for p in self.read_state()["processes"] if p["kind"] == kind and p["pid"]]
        os.kill(pids[0], signal.SIGKILL)

    def wait(self, condition: Callable[[], bool], deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, (
                f"not within {deadline_s} s: {self.command('status', check=False)}\n{self.logs()}"
            )
            time.sleep(0.02)

    def nothing_lost(self) -> dict[str, Any]:
        """The audit, after checking that it is clean and adds up."""
        audit: dict[str, Any] = self.json("audit")
        assert (audit["lost"], audit["twice"], audit["wrong_version"]) == (0, 0, 0), audit
        assert audit["acknowledged"] == audit["trained"] + audit["dead"] + audit["pending"] + audit["lost"], audit
        return audit

    def wait_finished(self, deadline_s: float = 300.0) -> None:
        def over() -> bool:
            state = self.read_state()
            assert state["state"] not in ("failed", "stopped"), f"{state['state']}: {state['reason']}\n{self.logs()}"
            return bool(state["state"] == "finished")

        self.wait(over, deadline_s)

    def wait_step(self, number: int, deadline_s: float = 120.0) -> None:
        self.wait(lambda: self.step() >= number, deadline_s)

    def wait_alive(self, deadline_s: float = 120.0) -> None:
        """Until every process runs (again)."""
        self.wait(lambda: all(p["pid"] for p in self.read_state()["processes"]), deadline_s)

    def logs(self) -> str:
        return "\n".join(
            f"── {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
            for path in sorted((self.folder / "logs").glob("*.log"))
        )


@pytest.fixture(scope="session")
def mesh_in() -> type[Mesh]:
    """A mesh in a folder of one's own, to be taken down by who makes it."""
    return Mesh


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    running = Mesh(tmp_path / "run")
    yield running
    running.down()
