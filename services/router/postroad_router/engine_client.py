"""What is asked of engines: /generate as SGLang has it, whole or as a stream of chunks, and /health."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgpack
import orjson

from postroad.telemetry.tracing import inject_context
from postroad_router.connection import Connection, Connections
from postroad_router.errors import EngineFailure, EngineRefusal, FailureKind

SILENCE_S = 10.0
PROBE_S = 5.0
ANSWER_BYTES = 256 * 1024 * 1024
EVENT_BYTES = 64 * 1024 * 1024
REFUSALS = (400, 413, 422)
DONE: dict[str, Any] = {}
MSGPACK = "application/msgpack"  # frames of a 4-byte length and a map, where an engine can; else SGLang's events


class Response:
    """An engine's open answer with status 200."""

    def __init__(self, client: EngineClient, url: str, connection: Connection, deadline_s: float) -> None:
        self._client, self._url, self._connection, self._deadline_s = client, url, connection, deadline_s
        self.ending = False  # set where nothing of interest is to come, and the connection can be kept
        self.done = False  # set where no more is wanted
        self.failure: EngineFailure | None = None  # what the next call of `chunks` raises
        self._rest = b""

    async def read(self) -> bytes:
        """The next bytes; none at the end. Raises EngineFailure and TimeoutError."""
        return await self._client.received(self._url, self._connection, self._deadline_s)

    async def whole(self) -> bytes:
        parts, size = [], 0
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > ANSWER_BYTES:
                raise EngineFailure("garbage", f"{self._url} sent an answer of more than {ANSWER_BYTES} bytes")
        return b"".join(parts)

    async def chunks(self) -> list[dict[str, Any]]:
        """The next chunks of a streamed generation; none at the end."""
        if self.failure is not None:
            raise self.failure
        while not self.ending and (data := await self.read()):
            split = _frames if self._connection.content_type == MSGPACK else _events
            payloads, self._rest = split(self._rest + data if self._rest else data, self._url)
            if len(self._rest) > EVENT_BYTES:
                raise EngineFailure("garbage", f"{self._url} sent an event of more than {EVENT_BYTES} bytes")
            if payloads and payloads[-1] is DONE:
                self.ending = True
                payloads.pop()
            if payloads:
                return payloads
        if not self.ending and self._connection.content_type != MSGPACK:
            raise EngineFailure("dropped", f"{self._url} closed the connection before the end")
        return []


class EngineClient:
    """One set of connections for all engines. An engine that says nothing for SILENCE_S must answer a probe to be
    waited for any longer."""

    def __init__(self, key: str, *, silence_s: float = SILENCE_S, probe_s: float = PROBE_S) -> None:
        self._key, self._silence_s, self._probe_s = key, silence_s, probe_s
        self._connections = Connections()

    async def close(self) -> None:
        self._connections.close()

    async def healthy(self, url: str) -> bool:
        try:
            async with asyncio.timeout(self._probe_s):
                connection = await self._connections.open(url)
                try:
                    connection.send(self._head("GET", url, "/health") + b"\r\n")
                    while connection.status is None and connection.error is None:
                        await connection.changed()
                    return connection.status == 200
                finally:
                    self._connections.give_back(url, connection, ending=connection.status is not None)
        except (TimeoutError, OSError):
            return False

    @asynccontextmanager
    async def post(
        self,
        url: str,
        body: dict[str, Any],
        deadline_s: float,
        accept: str = "text/event-stream",
        path: str = "/generate",
    ) -> AsyncIterator[Response]:
        """The open response. Raises EngineFailure or EngineRefusal where its status is not 200, and
        TimeoutError at `deadline_s` (of time.monotonic)."""
        try:
            connection = await self._connections.open(url)
        except (OSError, TimeoutError) as error:
            raise EngineFailure("connect", f"{url}: {error!r}") from error
        response = Response(self, url, connection, deadline_s)
        try:
            data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
            trace = "".join(f"{name}: {value}\r\n" for name, value in inject_context({}).items())
            lines = f"Accept: {accept}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n{trace}\r\n"
            connection.send(self._head("POST", url, path) + lines.encode("latin-1") + data)
            while connection.status is None:
                await self._news(url, connection, deadline_s)
            if connection.status != 200:
                await self._raise_for(url, connection)
            yield response
        finally:
            self._connections.give_back(url, connection, ending=response.ending)

    async def received(self, url: str, connection: Connection, deadline_s: float) -> bytes:
        while not (data := connection.take()):
            if connection.complete:
                return b""
            await self._news(url, connection, deadline_s)
        return data

    async def _news(self, url: str, connection: Connection, deadline_s: float) -> None:
        """Until something has come. Raises TimeoutError at the deadline, EngineFailure where nothing will come."""
        if connection.error is not None:
            raise EngineFailure("dropped", f"{url}: {connection.error!r}") from connection.error
        try:
            async with asyncio.timeout(max(min(self._silence_s, deadline_s - time.monotonic()), 0)):
                await connection.changed()
        except TimeoutError:
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"{url} did not finish before the deadline") from None
            if not await self.healthy(url):
                raise EngineFailure("silent", f"{url} says nothing and answers no probe") from None

    async def _raise_for(self, url: str, connection: Connection) -> None:
        try:
            text = (await self.received(url, connection, time.monotonic() + self._probe_s)).decode(errors="replace")
        except (TimeoutError, EngineFailure) as error:
            text = repr(error)
        status = connection.status or 0
        if status in REFUSALS:
            raise EngineRefusal(status, _message(text))
        kind: FailureKind = "busy" if status in (429, 503) else "status"
        raise EngineFailure(kind, f"{url} answered {status}: {text[:300]}")

    def _head(self, method: str, url: str, path: str) -> bytes:
        parts = urlsplit(url)
        text = f"{method} {parts.path}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {self._key}\r\n"
        return text.encode("latin-1")


def _events(data: bytes, url: str) -> tuple[list[dict[str, Any]], bytes]:
    """The objects of complete `data:` lines, and the rest."""
    *lines, rest = data.split(b"\n")
    texts = (line[5:].strip() for line in lines if line.startswith(b"data:"))
    return [DONE if text == b"[DONE]" else _parsed(text, url) for text in texts], rest


def _frames(data: bytes, url: str) -> tuple[list[dict[str, Any]], bytes]:
    found, start = [], 0
    while len(data) - start >= 4:
        (size,) = struct.unpack_from("<I", data, start)
        if size > EVENT_BYTES:
            raise EngineFailure("garbage", f"{url} sent a frame of {size} bytes")
        if len(data) - start - 4 < size:
            break
        try:
            found.append(_object(msgpack.unpackb(data[start + 4 : start + 4 + size]), url))
        except (ValueError, msgpack.UnpackException) as error:
            raise EngineFailure("garbage", f"{url} sent a frame that is no msgpack: {error!r}") from error
        start += 4 + size
    return found, data[start:]


def _parsed(payload: bytes, url: str) -> dict[str, Any]:
    try:
        return _object(orjson.loads(payload), url)
    except ValueError as error:
        raise EngineFailure("garbage", f"{url} sent {payload[:80]!r}: {error}") from error


def _object(chunk: Any, url: str) -> dict[str, Any]:
    if not isinstance(chunk, dict):
        raise EngineFailure("garbage", f"{url} sent {str(chunk)[:80]!r}, not an object")
    if "error" in chunk:
        raise EngineFailure("status", f"{url} failed within the stream: {str(chunk['error'])[:300]}")
    return chunk


def _message(text: str) -> str:
    """What the engine says is wrong, out of its usual wrappings."""
    try:
        value = orjson.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else orjson.dumps(value).decode()
