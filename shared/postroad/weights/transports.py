"""How a reader gets bytes of a snapshot: shared memory on the same host, TCP elsewhere. Reads block: use a thread."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from postroad.weights.manifest import Manifest, WeightsError
from postroad.weights.snapshot import Snapshot, memory_name

logger = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0
_HEADER = struct.Struct(">q")


class Reader(ABC):
    """An open way to one version at one endpoint."""

    @abstractmethod
    def read(self, offset: int, target: np.ndarray) -> None:
        """Fill `target` (uint8) from the image at `offset`. Raises OSError or WeightsError."""

    @abstractmethod
    def close(self) -> None: ...


def host_identity() -> str:
    """The same for two processes that can see each other's /proc entries."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


class SharedMemoryReader(Reader):
    """Reads the source's memfd through /proc: same host, same user, same pid namespace."""

    def __init__(self, endpoint: dict[str, Any], manifest: Manifest, key: str) -> None:
        if endpoint["host"] != host_identity():
            raise WeightsError("the source's shared memory is on another host")
        path = f"/proc/{endpoint['pid']}/fd/{endpoint['descriptor']}"
        if memory_name(manifest.run, manifest.version) not in os.readlink(path):
            raise WeightsError(f"{path} no longer holds version {manifest.version}")
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, target: np.ndarray) -> None:
        done = 0
        while done < target.size:
            count = os.preadv(self._descriptor, [target[done:].data], offset + done)
            if count == 0:
                raise WeightsError(f"the snapshot ends at byte {offset + done}")
            done += count

    def close(self) -> None:
        os.close(self._descriptor)


class TcpReader(Reader):
    """Reads from the source's SnapshotServer."""

    def __init__(self, endpoint: dict[str, Any], manifest: Manifest, key: str) -> None:
        self._version, self._key = manifest.version, key
        self._socket = socket.create_connection((endpoint["address"], endpoint["port"]), timeout=READ_TIMEOUT_S)

    def read(self, offset: int, target: np.ndarray) -> None:
        request = {"key": self._key, "version": self._version, "offset": offset, "size_bytes": target.size}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        header = np.empty(_HEADER.size, dtype=np.uint8)
        self._fill(header)
        (size,) = _HEADER.unpack(header.tobytes())
        if size != target.size:
            raise WeightsError(f"the source refused version {self._version}: it is released, or the key is wrong")
        self._fill(target)

    def _fill(self, target: np.ndarray) -> None:
        view, done = target.data, 0
        while done < len(view):
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise WeightsError("the source closed the connection in mid-read")
            done += count

    def close(self) -> None:
        self._socket.close()


READERS: dict[str, type[SharedMemoryReader] | type[TcpReader]] = {
    "shared_memory": SharedMemoryReader,
    "tcp": TcpReader,
}
PREFERENCE = ("shared_memory", "tcp")


class SnapshotServer:
    """Serves snapshots over TCP with sendfile. `find` gives the snapshot of a version, or None."""

    def __init__(self, find: Callable[[int], Snapshot | None], key: str) -> None:
        self._find, self._key = find, key
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        self._server = await asyncio.start_server(self._serve, host, 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await asyncio.wait_for(reader.readline(), 60):
                await asyncio.wait_for(self._answer(json.loads(line), writer), 60)
        except (TimeoutError, OSError, ValueError, KeyError, RuntimeError) as error:
            logger.info("a weight reader is gone: %r", error)
        finally:
            writer.close()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        snapshot = self._find(int(request["version"]))
        offset, size = int(request["offset"]), int(request["size_bytes"])
        allowed = hmac.compare_digest(str(request["key"]).encode(), self._key.encode())
        if not allowed or snapshot is None or offset < 0 or size < 0 or offset + size > snapshot.size_bytes:
            writer.write(_HEADER.pack(-1))
            await writer.drain()
            return
        writer.write(_HEADER.pack(size))
        await writer.drain()
        descriptor = os.dup(snapshot.descriptor)  # the publisher may release the snapshot while it is being sent
        with os.fdopen(descriptor, "rb") as image:
            await asyncio.get_running_loop().sendfile(writer.transport, image, offset, size)
