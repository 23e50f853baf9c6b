"""Limits of memory, processes and cpu by cgroup (version 2, or version 1), where this process may make one.

They come on top of rlimits and of the watch on memory, which hold everywhere.
"""

from __future__ import annotations

import contextlib
import logging
import time
from itertools import count
from pathlib import Path

from postroad_reward.sandbox.models import Limits

logger = logging.getLogger(__name__)

ROOT = Path("/sys/fs/cgroup")
EMPTY_WITHIN_S = 1.0
ZYGOTE_BYTES, ZYGOTE_PROCESSES = 128 << 20, 6
_numbers = count()


class ControlGroup:
    def __init__(self, folders: set[Path]) -> None:
        self._folders = folders

    @classmethod
    def create(cls, limits: Limits, pids: list[int]) -> ControlGroup | None:
        """A group with these processes in it; None where none can be made."""
        name = f"sandbox-{pids[0]}-{next(_numbers)}"
        ours = _values(limits)
        for parent in {parent for parent, _, _ in ours}:
            _remove_orphans(parent)
        values = [(parent / name, file, value) for parent, file, value in ours]
        group = cls({folder for folder, _, _ in values})
        try:
            for folder, file, value in values:
                folder.mkdir(exist_ok=True)
                (folder / file).write_text(str(value))
            for folder in group._folders:
                for pid in pids:
                    (folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            logger.debug("no cgroup: %s", error)
            group.remove()
            return None
        return group

    def remove(self) -> None:
        """To be called when its processes have ended; the kernel may need a moment."""
        end = time.monotonic() + EMPTY_WITHIN_S
        for folder in self._folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError as error:
                    if time.monotonic() > end:
                        logger.info("cgroup %s stays: %s", folder, error)
                        break
                    time.sleep(0.01)


def _remove_orphans(parent: Path) -> None:
    """Groups of services that were killed: their first process is gone, and nothing is in them."""
    for folder in parent.glob("sandbox-*-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _values(limits: Limits) -> list[tuple[Path, str, int | str]]:
    """Our own group's folder, a file in a group below it, and what is to be written there."""
    memory = limits.memory_bytes + limits.disk_bytes + ZYGOTE_BYTES
    processes = limits.processes + ZYGOTE_PROCESSES
    found: list[tuple[Path, str, int | str]] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers and (ROOT / "cgroup.controllers").exists():
            own = ROOT / path.lstrip("/")
            found += [(own, "memory.max", memory), (own, "pids.max", processes), (own, "cpu.max", "100000 100000")]
        files = {"memory": ("memory.limit_in_bytes", memory), "pids": ("pids.max", processes),
                 "cpu": ("cpu.cfs_quota_us", 100_000)}  # fmt: skip
        for controller in controllers.split(","):
            if controller in files and (ROOT / controller).is_dir():
                found.append((ROOT / controller / path.lstrip("/"), *files[controller]))
    return found
