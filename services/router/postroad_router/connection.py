"""HTTP/1.1 to engines: connections that are kept, each with one request at a time. httptools parses; there are no
layers between it and the reader, because every token of every stream passes here."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 3.0
DRAIN_S = 1.0
ADDRESSES = 64
KEEP_ALIVE_S = 2.0  # less than a server's, so that no request meets a connection that is being closed
BUFFER_BYTES = 4 * 1024 * 1024  # past it the engine is not read from until the client has taken something


class Connection(asyncio.Protocol):
    """`status` is None until the headers are there; `complete` is set with the last byte. `error` says why there will be
    no more."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.content_type = ""
        self.complete = True
        self.error: Exception | None = None
        self.idle_since = 0.0
        self._body: deque[bytes] = deque()
        self._buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._paused = False
        self._at_end: Callable[[], None] | None = None
        self._too_late: asyncio.TimerHandle

    @property
    def reusable(self) -> bool:
        return (
            self.complete
            and self.error is None
            and not self._transport.is_closing()
            and time.monotonic() - self.idle_since < KEEP_ALIVE_S
        )

    def send(self, request: bytes) -> None:
        self.status, self.content_type, self.complete = None, "", False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    def take(self) -> bytes:
        """What has been received of the body since the last time."""
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def changed(self) -> None:
        """Until something has been received or the connection is lost."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def at_end(self, then: Callable[[], None]) -> None:
        """Call `then` once the answer is complete; after DRAIN_S the connection is cut instead."""
        self._at_end, self._too_late = then, asyncio.get_running_loop().call_later(DRAIN_S, self.abort)

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ── asyncio and httptools call these ─────────────────────────────────────────────────────────────────────────
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete:  # nothing was asked
            self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.error = error
            self._transport.abort()
        if self._buffered > BUFFER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.complete:
            self.error = self.error or error or ConnectionResetError("the connection was closed before the end")
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.content_type = value.partition(b";")[0].decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        self.complete, self.idle_since = True, time.monotonic()
        if not self._parser.should_keep_alive():
            self._transport.close()
        if self._at_end is not None:
            self._too_late.cancel()  # else it would cut the next answer
            then, self._at_end = self._at_end, None
            then()


class Connections:
    """Idle connections by address."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}

    async def open(self, url: str) -> Connection:
        """Raises OSError or TimeoutError."""
        idle = self._idle.get(url, [])
        while idle:
            connection = idle.pop()
            if connection.reusable:
                return connection
            connection.close()
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        async with asyncio.timeout(CONNECT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, parts.hostname or "", parts.port or (443 if secure else 80), ssl=secure or None
            )
        return connection

    def give_back(self, url: str, connection: Connection, *, ending: bool = False) -> None:
        """Keep it for the next request. Where its answer is not complete it is cut, which the engine notices, unless
        it is `ending`: then the last bytes are let in first."""
        if not connection.complete and ending and connection.error is None:
            connection.at_end(lambda: self.give_back(url, connection))
        elif not connection.complete:
            connection.abort()
        elif connection.reusable:
            connection.take()
            self._idle.setdefault(url, []).append(connection)
        if len(self._idle) > ADDRESSES:  # most of them are of engines that are no more
            self._idle = {url: kept for url, kept in self._idle.items() if any(each.reusable for each in kept)}

    def close(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
