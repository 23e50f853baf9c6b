"""Fixtures for every test: a real nats-server and a real Valkey, each in its own folder and on its own port."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from postroad.supervisor.servers import Server, free_port, nats_server, valkey_server

os.environ.setdefault("OMP_NUM_THREADS", "1")


def wait_for(condition: Callable[[], bool], deadline_s: float = 20.0, interval_s: float = 0.02) -> None:
    """Wait until `condition` holds; fail after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {deadline_s} s"
        time.sleep(interval_s)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Running:
    """A server process of a test, that it may kill and start again on the same port."""

    server: Server
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return self.server.url

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        self.process = subprocess.Popen(self.server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: listens(self.server.port))


def _run(server: Server) -> Iterator[Running]:
    running = Running(server, None)  # type: ignore[arg-type]
    running.start()
    yield running
    running.kill()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Running]:
    yield from _run(nats_server(tmp_path / "nats", free_port(), "nats-secret"))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Running]:
    yield from _run(valkey_server(tmp_path / "valkey", free_port(), "valkey-secret"))
