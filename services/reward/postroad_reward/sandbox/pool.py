"""The sandboxes of a service: warm ones wait, each serves one job or session at a time, broken ones are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from postroad_reward.sandbox.models import Job, Limits, Result, SandboxLost, SandboxUnavailable, SessionClosed
from postroad_reward.sandbox.root import UID
from postroad_reward.sandbox.slot import REMEDY, Slot

PROBE = """
import os, socket
print(os.getuid(), set(os.listdir("/")) <= {"dev", "lib", "lib64", "packages", "python", "tmp"})
try: socket.socket()
except PermissionError: print("no network")
"""
PROBED = f"{UID} True\nno network\n"


@dataclass
class Session:
    """A python whose state lasts from cell to cell. The value of a last expression is printed, as in a notebook."""

    _slot: Slot
    _life_s: float
    closed: bool = False

    async def run(self, code: str, deadline_s: float = 10.0) -> Result:
        """Raises SessionClosed after a limit or an exit ended it, and SandboxLost."""
        if self.closed:
            raise SessionClosed("the session has ended and its state is gone; open another one")
        self.closed = True  # until the answer says that it goes on
        result = await self._slot.run(Job(code, deadline_s=deadline_s), session=True, life_s=self._life_s)
        self.closed = not self._slot.alive
        return result


class Sandbox:
    """At most `size` jobs and sessions at the same time; further ones wait. `packages` are distributions that code may
    import, `imports` modules that are imported before any job."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        size: int = 64,
        packages: tuple[str, ...] = (),
        imports: tuple[str, ...] = (),
    ) -> None:
        self.limits, self._packages, self._imports = limits or Limits(), packages, imports
        self._room = asyncio.Semaphore(size)
        self._warm = min(size, os.cpu_count() or 1)
        self._idle: list[Slot] = []
        self._slots: set[Slot] = set()
        self._starting, self._started = asyncio.Lock(), False

    async def start(self) -> None:
        """Start the warm ones; the first job does so, where nobody did before. Raises SandboxUnavailable where this
        machine can't isolate code: there is no weaker way."""
        async with self._starting:
            if self._started:
                return
            slots = [await self._start() for _ in range(self._warm)]
            probe = await slots[0].run(Job(PROBE))
            if probe.stdout != PROBED:
                await self.close()
                raise SandboxUnavailable(f"the sandbox does not isolate: {probe.stdout}{probe.stderr}. {REMEDY}")
            self._idle, self._started = slots, True

    async def run(self, job: Job) -> Result:
        """Raises SandboxLost where the sandbox itself failed. A cancelled job is killed."""
        async with self._slot() as slot:
            return await slot.run(job)

    @contextlib.asynccontextmanager
    async def session(self, life_s: float = 600.0) -> AsyncIterator[Session]:
        """A session, which may use `life_s` seconds of cpu time in all."""
        async with self._slot() as slot:
            session = Session(slot, life_s)
            yield session
            session.closed = True
            if slot.alive:
                await slot.end_session()

    async def close(self) -> None:
        await asyncio.gather(*(self._discard(slot) for slot in list(self._slots)))
        self._idle.clear()

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[Slot]:
        if not self._started:
            await self.start()
        async with self._room:
            slot, healthy = await self._take(), False
            try:
                yield slot
                healthy = not slot.owing
            finally:
                if healthy:
                    self._idle.append(slot)
                else:
                    await self._discard(slot)

    async def _take(self) -> Slot:
        while self._idle:
            slot = self._idle.pop()
            if slot.process.returncode is None:
                return slot
            await self._discard(slot)
        try:
            return await self._start()
        except SandboxUnavailable as error:  # it could run when the service started
            raise SandboxLost(str(error)) from error

    async def _start(self) -> Slot:
        slot = await Slot.start(self.limits, self._packages, self._imports)
        self._slots.add(slot)
        return slot

    async def _discard(self, slot: Slot) -> None:
        self._slots.discard(slot)
        await slot.kill()
