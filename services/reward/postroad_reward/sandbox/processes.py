"""What /proc says of the processes in a sandbox."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        try:
            listings = [path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children")]
        except OSError:  # it has ended
            continue
        children = [int(child) for listing in listings for child in listing.split()]
        found += children
        waiting += children
    return found


def memory_bytes(pids: Iterable[int]) -> int:
    """Private and shared memory without files; what processes share is counted for each of them."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return total
