"""Drives `make compose-test`: build, up, some steps, kill a container, finish, audit, down. Exits 1 with the logs."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "compose" / "compose.yaml"
DEADLINE_S = 600.0
BUILT = ("nats", "trainer", "engine", "router", "reward")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Compose:
    def __init__(self, engine: str, command: list[str]) -> None:
        self.engine = engine
        self.command = [*command, "-p", "postroad-test", "-f", str(FILE)]
        names = ("POSTROAD_NATS_PASSWORD", "POSTROAD_REDIS_PASSWORD", "POSTROAD_KEY")
        self.environment = {
            **os.environ,
            **{name: secrets.token_hex(16) for name in names},
            "POSTROAD_ROUTER_PORT": str(free_port()),
        }

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 1800) -> str:
        done = subprocess.run([*self.command, *arguments], env=self.environment, cwd=ROOT, text=True,
                              capture_output=True, timeout=timeout_s)  # fmt: skip
        if check and done.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout

    def ask(self, *arguments: str) -> list[dict]:
        """What a postroad command in the reward container prints as JSON lines; nothing while it can't answer."""
        text = self.run("exec", "-T", "reward", "postroad", *arguments, "--json", check=False, timeout_s=120)
        try:
            return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        except ValueError:
            return []

    def container(self, service: str) -> str:
        names = subprocess.run(
            [self.engine, "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True
        ).stdout
        return next(
            name for name in names.split() if f"{service}" in name and "postroad-test" in name.replace("_", "-")
        )

    def steps(self) -> int:
        return max((line["step"] for line in self.ask("steps")), default=0)


def wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {DEADLINE_S:.0f} s: {what}")
        time.sleep(1)
    print(f"compose-test: {what}", flush=True)


def main() -> int:
    compose = Compose(sys.argv[1], sys.argv[2:])
    compose.run("down", "-v", check=False)
    try:
        for service in BUILT:  # one after the other, so that they share the layer with torch
            compose.run("build", service, timeout_s=2400)
        print("compose-test: images built", flush=True)
        compose.run("up", "-d")
        wait(lambda: compose.steps() >= 3, "3 steps trained")
        worker = compose.container("worker")
        subprocess.run([compose.engine, "kill", "-s", "KILL", worker], check=True, capture_output=True)
        subprocess.run([compose.engine, "start", worker], check=True, capture_output=True)
        wait(lambda: compose.steps() >= 20, "20 steps trained, the worker killed and started again")
        audit = compose.ask("audit")[0]
        print(json.dumps(audit))
        if any(audit[name] for name in ("lost", "twice", "wrong_version")):
            raise SystemExit("compose-test: the audit found losses")
    except SystemExit:
        print(compose.run("logs", check=False)[-6000:], file=sys.stderr)
        raise
    finally:
        compose.run("down", "-v", check=False)
    print("compose-test: 1 passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
