"""A process that holds images of weights and lets others read them: a trainer's rank, or an engine that relays."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from postroad.weights.snapshot import Image
from postroad.weights.transports import HEADER, KEY_IS_WRONG, RELEASED

logger = logging.getLogger(__name__)

IDLE_S = 60.0
SLOWEST_BYTES_S = 1e6  # a reader that takes less than this is cut off
_SMALL_BYTES = 64 * 1024
_LINE_BYTES = 1024 * 1024


class ImageServer:
    """Serves ranges of images over TCP, with sendfile. `find` gives the image of a version, or None."""

    def __init__(self, find: Callable[[int], Image | None], key: str) -> None:
        self._find, self._key = find, key
        self._server: asyncio.Server | None = None
        self._address, self._port = "", 0

    async def start(self, host: str, advertise: str = "") -> None:
        self._server = await asyncio.start_server(self._serve, host, 0, limit=_LINE_BYTES)
        self._address = advertise or host
        self._port = int(self._server.sockets[0].getsockname()[1])

    def endpoint(self) -> dict[str, Any]:
        return {"transport": "tcp", "address": self._address, "port": self._port}

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await asyncio.wait_for(reader.readline(), IDLE_S):
                await self._answer(json.loads(line), writer)
        except (TimeoutError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.info("a weight reader is gone: %r", error)
        finally:
            writer.transport.abort()

    async def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        image = self._find(int(request["version"]))
        ranges = [(int(offset), int(size)) for offset, size in request["ranges"]]
        allowed = hmac.compare_digest(str(request["key"]).encode(), self._key.encode())
        total = sum(size for _, size in ranges)
        if not allowed or image is None or any(o < 0 or s < 0 or o + s > image.size_bytes for o, s in ranges):
            writer.write(HEADER.pack(RELEASED if allowed else KEY_IS_WRONG))
            await writer.drain()
            return
        writer.write(HEADER.pack(total))
        await asyncio.wait_for(self._send(image, _merged(ranges), writer), IDLE_S + total / SLOWEST_BYTES_S)

    async def _send(self, image: Image, ranges: list[tuple[int, int]], writer: asyncio.StreamWriter) -> None:
        """The image may be released meanwhile: what is being sent holds on to it."""
        loop, memory, own = asyncio.get_running_loop(), image.bytes, writer.get_extra_info("socket")
        near = own.getpeername()[0] == own.getsockname()[0]
        with os.fdopen(os.dup(image.descriptor), "rb") as file, socket.socket(fileno=os.dup(own.fileno())) as direct:
            direct.setblocking(False)
            for offset, size in ranges:
                if size <= _SMALL_BYTES:
                    writer.write(os.pread(file.fileno(), size, offset))
                    continue
                await writer.drain()
                if near and offset + size <= memory.size and not writer.transport.get_write_buffer_size():
                    # on the same host sendfile, which goes page by page, takes twice the time of a copy
                    await loop.sock_sendall(direct, memory[offset : offset + size].data)
                else:
                    await loop.sendfile(writer.transport, file, offset, size)
        await writer.drain()


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What lies one after another, in one piece."""
    out: list[tuple[int, int]] = []
    for offset, size in ranges:
        if out and sum(out[-1]) == offset:
            out[-1] = (out[-1][0], out[-1][1] + size)
        else:
            out.append((offset, size))
    return out
