"""HTTP to engines: SGLang's /generate as a stream of chunks, and /health."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from postroad.telemetry.tracing import inject_context
from postroad_router.errors import EngineFailure, EngineRefusal, FailureKind

CONNECT_S = 3.0
SILENCE_S = 10.0
PROBE_S = 5.0
KEEP_ALIVE_S = 2.0  # less than a server's, so that no request meets a connection that is being closed
LINE_BYTES = 64 * 1024 * 1024
REFUSALS = (400, 413, 422)


class EngineClient:
    """One connection pool for all engines. An engine that says nothing for SILENCE_S must answer a probe to be
    waited for any longer."""

    def __init__(self, key: str, *, silence_s: float = SILENCE_S, probe_s: float = PROBE_S) -> None:
        self._headers = {"Authorization": f"Bearer {key}"}
        self._silence_s, self._probe_s = silence_s, probe_s

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            headers=self._headers, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S), auto_decompress=False,
        )  # fmt: skip

    async def close(self) -> None:
        await self._session.close()

    async def healthy(self, url: str) -> bool:
        try:
            async with (
                asyncio.timeout(self._probe_s),
                self._session.get(f"{url}/health") as response,
            ):
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False

    @asynccontextmanager
    async def post(self, url: str, body: dict[str, Any], deadline_s: float) -> AsyncIterator[aiohttp.ClientResponse]:
        """The open response to /generate. Raises EngineFailure or EngineRefusal where its status is not 200, and
        TimeoutError at `deadline_s` (of time.monotonic)."""
        try:
            posting = asyncio.ensure_future(
                self._session.post(f"{url}/generate", json=body, headers=inject_context({}))
            )
            response = await self._patiently(url, posting, deadline_s)
        except aiohttp.ServerTimeoutError as error:
            raise EngineFailure("connect", f"{url}: {error!r}") from error
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError) as error:
            raise EngineFailure("connect", f"{url}: {error!r}") from error
        try:
            if response.status != 200:
                await _raise_for(response, url)
            yield response
        finally:
            response.close()  # an unfinished response: the engine sees it and aborts

    async def chunks(self, url: str, body: dict[str, Any], deadline_s: float) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON chunks of a streamed generation, until the engine's [DONE]."""
        async with self.post(url, body, deadline_s) as response:
            async for line in self.lines(url, response, deadline_s):
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    return
                yield _parsed(payload, url)
        raise EngineFailure("dropped", f"{url} closed the connection before the end")

    async def lines(self, url: str, response: aiohttp.ClientResponse, deadline_s: float) -> AsyncGenerator[bytes, None]:
        rest = b""
        while True:
            data = await self.read(url, response, deadline_s)
            if not data:
                return
            *complete, rest = (rest + data).split(b"\n")
            if len(rest) > LINE_BYTES:
                raise EngineFailure("garbage", f"{url} sent a line of more than {LINE_BYTES} bytes")
            for line in complete:
                yield line

    async def read(self, url: str, response: aiohttp.ClientResponse, deadline_s: float) -> bytes:
        """The next bytes; none at the end."""
        while True:
            try:
                async with asyncio.timeout(self._patience_s(deadline_s)):
                    return await response.content.readany()
            except TimeoutError:
                await self._still_there(url, deadline_s)
            except (aiohttp.ClientError, OSError) as error:
                raise EngineFailure("dropped", f"{url}: {error!r}") from error

    async def _patiently(
        self, url: str, posting: asyncio.Future[aiohttp.ClientResponse], deadline_s: float
    ) -> aiohttp.ClientResponse:
        delivered = False
        try:
            while not posting.done():
                await asyncio.wait({posting}, timeout=self._patience_s(deadline_s))
                if not posting.done():
                    await self._still_there(url, deadline_s)
            delivered = True
            return posting.result()
        finally:
            if not delivered and not posting.cancel() and not posting.cancelled() and posting.exception() is None:
                posting.result().close()  # it came while this call was being cancelled

    def _patience_s(self, deadline_s: float) -> float:
        return max(min(self._silence_s, deadline_s - time.monotonic()), 0)

    async def _still_there(self, url: str, deadline_s: float) -> None:
        if time.monotonic() >= deadline_s:
            raise TimeoutError(f"{url} did not finish before the deadline")
        if not await self.healthy(url):
            raise EngineFailure("silent", f"{url} says nothing and answers no probe")


async def _raise_for(response: aiohttp.ClientResponse, url: str) -> None:
    try:
        async with asyncio.timeout(PROBE_S):
            text = (await response.content.read(4096)).decode(errors="replace")
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        text = repr(error)
    if response.status in REFUSALS:
        raise EngineRefusal(response.status, _message(text))
    kind: FailureKind = "busy" if response.status in (429, 503) else "status"
    raise EngineFailure(kind, f"{url} answered {response.status}: {text[:300]}")


def _message(text: str) -> str:
    """What the engine says is wrong, out of its usual wrappings."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(payload: bytes, url: str) -> dict[str, Any]:
    try:
        chunk = json.loads(payload)
    except ValueError as error:
        raise EngineFailure("garbage", f"{url} sent {payload[:80]!r}: {error}") from error
    if not isinstance(chunk, dict):
        raise EngineFailure("garbage", f"{url} sent {payload[:80]!r}, not an object")
    if "error" in chunk:
        raise EngineFailure("status", f"{url} failed within the stream: {str(chunk['error'])[:300]}")
    return chunk
