"""What the services of a mesh say of themselves in the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from postroad.store import Store

KINDS = ("engine", "router", "reward", "worker", "trainer")


@dataclass(frozen=True)
class Member:
    kind: str
    name: str
    pid: int | None
    port: int | None
    version: int | None
    info: dict[str, Any]


async def read_members(store: Store) -> list[Member]:
    """Everyone who is registered now."""
    return [
        Member(kind, name, info.get("pid"), _port(info), info.get("version"), info)
        for kind in KINDS
        for name, info in sorted((await store.members(kind)).items())
    ]


def _port(info: dict[str, Any]) -> int | None:
    if info.get("port"):
        return int(info["port"])
    return urlsplit(info["url"]).port if info.get("url") else None


def of_process(members: list[Member], pid: int) -> Member | None:
    """The member that is the process `pid` or a child of it (a trainer's rank)."""
    for member in members:
        if member.pid == pid or (member.pid is not None and _parent(member.pid) == pid):
            return member
    return None


def _parent(pid: int) -> int | None:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(after_name.split()[1])
