"""One running bubblewrap: it serves one job, or one session, at a time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import struct
from asyncio.subprocess import PIPE, Process
from importlib.resources import files
from pathlib import Path
from typing import Any

from postroad_reward.sandbox import root
from postroad_reward.sandbox.control_group import ControlGroup
from postroad_reward.sandbox.models import Job, Limits, Result, SandboxLost, SandboxUnavailable
from postroad_reward.sandbox.processes import descendants, memory_bytes
from postroad_reward.sandbox.seccomp import program

START_S, SLACK_S = 20.0, 5.0
WATCH_S = 0.05
FRAME_BYTES = 64 << 20
REMEDY = (
    "Jobs need unprivileged user namespaces. As an ordinary user: sysctl kernel.unprivileged_userns_clone=1, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0. In Docker: a USER that is not root and security_opt "
    "seccomp=unconfined, or root with cap_add SYS_ADMIN and seccomp=unconfined."
)


class Slot:
    """Raises SandboxLost from each method when the sandbox broke; then it is good for `kill` alone."""

    def __init__(self, process: Process, limits: Limits) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.limits, self._stdin, self._stdout = process, limits, process.stdin, process.stdout
        self.alive = False  # whether a session goes on
        self.owing = False  # an answer, for ever where the sandbox broke or nobody waited for it
        self._pid, self._pidfd, self._idle_bytes = 0, -1, 0
        self._group: ControlGroup | None = None

    @classmethod
    async def start(cls, limits: Limits, packages: tuple[str, ...], imports: tuple[str, ...]) -> Slot:
        """Raises SandboxUnavailable where bwrap can't run."""
        options = await asyncio.to_thread(root.command, packages)
        info, other = os.pipe()
        with os.fdopen(info, "rb") as reader:
            try:
                process = await asyncio.create_subprocess_exec(
                    options[0], "--info-fd", str(other), *options[1:], files(__package__).joinpath("zygote.py").read_text(),
                    stdin=PIPE, stdout=PIPE, stderr=PIPE, env={}, pass_fds=[other],
                )  # fmt: skip
            except OSError as error:
                raise SandboxUnavailable(f"bwrap can't be started: {error}") from error
            finally:
                os.close(other)
            slot = cls(process, limits)
            try:
                async with asyncio.timeout(START_S):
                    await slot._greet(reader, imports)
            except (SandboxLost, TimeoutError, OSError, ValueError) as error:
                reason = await slot._last_words()
                raise SandboxUnavailable(f"the sandbox can't start: {reason or error!r}. {REMEDY}") from error
            except BaseException:
                await slot.kill()
                raise
        return slot

    async def _greet(self, info: Any, imports: tuple[str, ...]) -> None:
        await self._send({
            "limits": self.limits.model_dump(), "uid": root.UID, "imports": imports,
            "filter": base64.b64encode(program()).decode(),
        })  # fmt: skip
        state = await self._receive()
        self._pid = int(json.load(info)["child-pid"])
        self._pidfd = os.pidfd_open(self._pid)
        if state["status"] == "map":
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{self._pid}/{name}").write_text(f"{root.UID} {root.UID} 1")  # noqa: ASYNC240  no disk
            await self._send({})
            await self._receive()
        members = [self.process.pid, *descendants(self.process.pid)]
        self._group = ControlGroup.create(self.limits, members)
        self._idle_bytes = memory_bytes(members)

    async def run(self, job: Job, *, session: bool = False, life_s: float | None = None) -> Result:
        self.owing = True
        await self._send({
            "code": job.code, "stdin": base64.b64encode(job.stdin).decode(), "deadline_s": job.deadline_s,
            "files": {path: base64.b64encode(content).decode() for path, content in job.files.items()},
            "session": session, "life_s": life_s or job.deadline_s,
        })  # fmt: skip
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(job.deadline_s + SLACK_S):
                answer = await self._receive()
                self.alive, self.owing = answer.pop("alive"), False
                if answer["status"] == "lost":
                    raise SandboxLost(f"the sandbox could not set the job up: {answer['stderr']}")
                return Result(**answer)
        except TimeoutError as error:
            raise SandboxLost(f"the sandbox did not answer {SLACK_S:g} s after the job's deadline") from error
        finally:
            watch.cancel()

    async def end_session(self) -> None:
        await self._send({"end": True})

    async def kill(self) -> None:
        """Kill everything in the sandbox; returns when it is gone."""
        self._kill_inner()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self._stdin.close()
        await self.process.wait()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._group is not None:
            await asyncio.to_thread(self._group.remove)
            self._group = None

    def _kill_inner(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _watch(self) -> None:
        """End the job when all its processes together take more memory than one may, which no rlimit says, and the
        sandbox when bwrap is gone: where root runs it, its own death signal can't reach a process of another user."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.process.returncode is not None:
                self._kill_inner()
                return
            if memory_bytes(descendants(self.process.pid)) - self._idle_bytes > self.limits.memory_bytes:
                with contextlib.suppress(SandboxLost):  # whoever waits for the answer sees that too
                    await self._send({"kill": "memory"})
                return

    async def _last_words(self) -> str:
        await self.kill()
        assert self.process.stderr is not None
        return (await self.process.stderr.read(2000)).decode(errors="replace").strip()

    async def _send(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        try:
            self._stdin.write(struct.pack(">I", len(data)) + data)
            await self._stdin.drain()
        except ConnectionError as error:
            raise SandboxLost("the sandbox has ended") from error

    async def _receive(self) -> dict[str, Any]:
        try:
            size: int = struct.unpack(">I", await self._stdout.readexactly(4))[0]
            if size > FRAME_BYTES:
                raise SandboxLost(f"the sandbox sent a frame of {size} bytes")
            value: dict[str, Any] = json.loads(await self._stdout.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise SandboxLost("the sandbox has ended") from error
        return value
