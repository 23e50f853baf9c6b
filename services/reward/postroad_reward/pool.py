"""The graders' processes, seen from the service: a small pool that kills and replaces what hangs or dies.

It holds as many processes as there are cores, and grows up to `limit` while gradings wait for one (graders that wait
for a judge use no core). A request and its answer are one frame each; there is no state to lose in a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass, field
from typing import Any

from postroad_reward import wire
from postroad_reward.errors import GraderFailed, GraderTimeout, RemoteTraceback
from postroad_reward.graders import Attempt, Grade, checked_grade

logger = logging.getLogger(__name__)

START_S = 60.0
END_S = 2.0
GROW_AFTER_S = 0.5
MEMORY_BYTES = 4 << 30  # of address space, of which libraries reserve far more than they use


class Worker:
    """One process."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout

    @classmethod
    async def spawn(cls, memory_bytes: int) -> Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "postroad_reward.worker", str(os.getpid()), str(memory_bytes),
            stdin=PIPE, stdout=PIPE, start_new_session=True,
        )  # fmt: skip
        return cls(process)

    async def call(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """The answer. Raises TimeoutError, and GraderFailed where the process died or the grader raised."""
        try:
            async with asyncio.timeout(deadline_s):
                self.stdin.write(wire.pack(request))
                await self.stdin.drain()
                answer = await wire.read_async(self.stdout)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            code = await self.end()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise GraderFailed(f"the grader's process {how} in mid-work") from error
        except (wire.FrameError, ValueError) as error:
            raise GraderFailed(f"the grader's process gave no valid answer: {error}") from error
        return answer

    async def end(self) -> int:
        """Kill the process and all that it started; its exit code where it had ended by itself."""
        self.stdin.close()
        with contextlib.suppress(TimeoutError):  # it is leaving already where its pipe is closed
            if self.stdout.at_eof():
                await asyncio.wait_for(self.process.wait(), END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return await self.process.wait()


@dataclass
class Pool:
    """`prepare` names graders (and their settings) whose libraries each process imports before its first grading."""

    limit: int
    prepare: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    memory_bytes: int = MEMORY_BYTES
    counts: dict[str, int] = field(default_factory=lambda: {"started": 0, "timeout": 0, "died": 0})

    def __post_init__(self) -> None:
        self._size = min(self.limit, os.cpu_count() or 1)
        self._idle: asyncio.LifoQueue[Worker | None] = asyncio.LifoQueue()  # None: leave to start a process
        for _ in range(self._size):
            self._idle.put_nowait(None)
        self._workers: set[Worker] = set()
        self._starting = 0

    async def start(self) -> None:
        """Start the first process. Raises GraderFailed where the grader can't be prepared."""
        self._idle.put_nowait(await self._take())

    async def close(self) -> None:
        await asyncio.gather(*(self._discard(worker) for worker in list(self._workers)))

    async def grade(
        self, grader: str, settings: dict[str, Any], attempts: list[Attempt], deadline_s: float
    ) -> list[Grade]:
        """Grade in a process, in one call. Raises GraderTimeout after `deadline_s`, GraderFailed with the grader's
        traceback as its cause. A cancelled grading kills its process."""
        request = {
            "kind": "grade", "grader": grader, "settings": settings, "attempts": [vars(attempt) for attempt in attempts],
        }  # fmt: skip
        worker, healthy = await self._take(), False
        try:
            answer = await worker.call(request, deadline_s)
            healthy = True
        except TimeoutError as error:
            self.counts["timeout"] += 1
            logger.warning(
                "grader %s ran past %.1f s: its process %d is killed", grader, deadline_s, worker.process.pid
            )
            raise GraderTimeout(f"the grader {grader!r} did not answer within {deadline_s:g} s") from error
        except GraderFailed:
            self.counts["died"] += 1
            raise
        finally:
            if healthy:
                self._idle.put_nowait(worker)
            else:
                await self._discard(worker)
                self._idle.put_nowait(None)
        return [checked_grade(Grade(**grade)) for grade in _result(answer)["grades"]]

    async def _take(self) -> Worker:
        """An idle process, or a new one."""
        while True:
            try:
                worker = await asyncio.wait_for(self._idle.get(), GROW_AFTER_S)
            except TimeoutError:
                if self._size >= self.limit or self._starting:
                    continue
                self._size, worker = self._size + 1, None
            if worker is not None and worker.process.returncode is not None:  # it died while it was idle
                self.counts["died"] += 1
                await self._discard(worker)
                worker = None
            return worker or await self._start_worker()

    async def _start_worker(self) -> Worker:
        self._starting += 1
        worker = None
        try:
            worker = await Worker.spawn(self.memory_bytes)
            self._workers.add(worker)
            self.counts["started"] += 1
            for name, settings in self.prepare:
                _result(await worker.call({"kind": "prepare", "grader": name, "settings": settings}, START_S))
            return worker
        except BaseException as error:
            self._idle.put_nowait(None)
            if worker is not None:
                await self._discard(worker)
            if isinstance(error, TimeoutError):
                raise GraderFailed(f"a grader's process was not ready within {START_S:.0f} s") from error
            raise
        finally:
            self._starting -= 1

    async def _discard(self, worker: Worker) -> None:
        self._workers.discard(worker)
        await worker.end()


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer without its error, which is raised."""
    if "error" in answer:
        cause = RemoteTraceback(str(answer.get("traceback", "")))
        raise GraderFailed(str(answer["error"]), settings=bool(answer.get("settings"))) from cause
    return answer
