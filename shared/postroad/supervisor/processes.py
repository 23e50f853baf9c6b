"""Child processes that never outlive the one that started them, even after a kill -9 of that."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
ORPHANED = 143  # exit code of a child whose parent was gone before it could ask to die with it


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends. Services call it first in main, so
    that it holds for the ranks of a trainer too."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own, its output appended to `log`. To be called from the main thread:
    the kernel kills the child when the thread that forked it ends."""
    parent = os.getpid()

    def before_exec() -> None:
        die_with_parent()
        if os.getppid() != parent:  # the parent died before the kernel knew
            os._exit(ORPHANED)

    with log.open("ab") as output:
        return subprocess.Popen(
            list(command), env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=before_exec,
        )  # fmt: skip


async def exited(process: subprocess.Popen[bytes]) -> int:
    """Wait, without polling, until the process ends; what is left of its process group is killed. Its exit code."""
    descriptor = os.pidfd_open(process.pid)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    signal_group(process, signal.SIGKILL)  # before it is reaped: its id can't be another's yet
    return process.wait()


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the process and what it started in its group."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
