"""One process that is kept alive: start → run → die → wait → start …, until it is told to stop or is given up."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from postroad.supervisor.plan import Service
from postroad.supervisor.processes import exited, signal_group, start
from postroad.supervisor.restarts import Restarts
from postroad.supervisor.state import ProcessRecord

logger = logging.getLogger(__name__)

FATAL = 3  # exit code of a service that can't go on as it is configured
TAIL_LINES = 12
TAIL_BYTES = 8192

End = Literal["done", "fatal", "given_up", "stopped"]


class Child:
    """Keeps `service` alive. `changed` is called at each change of its record."""

    def __init__(
        self, service: Service, environment: Mapping[str, str], logs: Path, changed: Callable[[Child], None]
    ) -> None:
        self.service = service
        self.record = ProcessRecord(kind=service.kind, name=service.name, port=service.port)
        self.log = logs / f"{service.name}.log"
        own = {"POSTROAD_NAME": service.name, "POSTROAD_PORT": str(service.port or 0)}
        self._environment = {**environment, **own}
        self._changed = changed
        self._restarts = Restarts()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self._process is not None

    async def keep(self) -> tuple[End, int]:
        """Keep the process alive until it is done, fatal, given up or stopped; how it ended and its last exit code."""
        code = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._live()
            if self._stopping.is_set():
                break
            if self.service.kind == "trainer" and code == 0:
                return "done", code
            if code == FATAL:
                return "fatal", code
            now = time.monotonic()
            delay_s = self._restarts.after(now - began, now)
            if delay_s is None:
                return "given_up", code
            logger.warning("%s ended with code %d; again in %.1f s", self.service.name, code, delay_s)
            self.record.restarts = self._restarts.count
            self._become("backoff")
            try:
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            except TimeoutError:
                continue
        self._become("stopped")
        return "stopped", code

    async def _live(self) -> int:
        self._process = start(self.service.command, self._environment, self.log)
        self.record.pid, self.record.started = self._process.pid, time.time()
        self._become("starting")
        try:
            return await exited(self._process)
        finally:
            self._process = None
            self.record.pid = None
            self.record.version = None
            self._become("stopped")

    def ready(self, port: int | None, version: int | None) -> None:
        """The process says that it takes work, with what it says of itself."""
        record = self.record
        if (record.state, record.port, record.version) != ("ready", port or record.port, version):
            record.port, record.version = port or record.port, version
            self._become("ready")

    def stop(self, number: signal.Signals) -> None:
        """Signal the process; it is not started again."""
        self._stopping.set()
        if self._process is not None:
            signal_group(self._process, number)

    def tail(self) -> str:
        """The last lines of the log."""
        return tail(self.log)

    def _become(self, state: Literal["starting", "ready", "backoff", "stopped"]) -> None:
        self.record.state = state
        self._changed(self)


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
