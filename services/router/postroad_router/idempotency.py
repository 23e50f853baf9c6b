"""Requests with an `Idempotency-Key`: answered once, by whichever router, and the stored answer to every retry.

Who answers holds a claim in Redis that outlives it by CLAIM_S. So a retry after the death of a router waits for no
longer than that; what a session has recorded by then is answered again, see `exchange`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import msgpack
from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from postroad.store import Store, StoreError
from postroad_router.access import GENERATING
from postroad_router.bodies import read_bytes
from postroad_router.errors import ApiError

logger = logging.getLogger(__name__)

CLAIM_S = 5.0
ANSWER_S = 3600.0
ANSWER_BYTES = 8 * 1024 * 1024
WAIT_S = 600.0
POLL_S = 0.1
KEY_LENGTH = 255
PASSING = (408, 409, 425, 429, 499)  # what a retry may find otherwise


@dataclass(frozen=True)
class Claim:
    """`fingerprint` is that of the request, so that a key names one request only."""

    key: str
    fingerprint: bytes
    owner: bytes


class Idempotency:
    """ASGI middleware, within `Access` and without `Admission`: an answer from the store takes no place."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app, self._store, self._client = app, store, store.binary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generating = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATING
        name = dict(scope["headers"]).get(b"idempotency-key", b"") if generating else b""
        if not name:
            await self._app(scope, receive, send)
            return
        if len(name) > KEY_LENGTH:
            raise ApiError(
                400, f"Idempotency-Key has more than {KEY_LENGTH} characters", code="invalid_idempotency_key"
            )
        body, caller = await read_bytes(Request(scope, receive)), scope["state"]["caller"]
        place = "\n".join((caller.identity.name, caller.session, scope["path"])).encode()
        key = hashlib.sha256(place + b"\n" + name).hexdigest()
        claim = Claim(self._store.key("idempotency", key), hashlib.sha256(place + body).digest(), uuid.uuid4().bytes)
        stored = await self._claimed(claim)
        if stored is not None:
            await _replay(stored, send)
            return
        scope["state"]["caller"] = replace(caller, generation=key)
        await self._answer(claim, scope, _with_body(body, receive), send)

    async def _claimed(self, claim: Claim) -> list[Any] | None:
        """None once the claim is ours, or the stored answer. Raises ApiError 409 and 503."""
        end = time.monotonic() + WAIT_S
        running = msgpack.packb([claim.fingerprint, claim.owner])
        try:
            while time.monotonic() < end:
                if await self._client.set(claim.key, running, nx=True, px=int(CLAIM_S * 1000)):
                    return None
                found = await self._client.get(claim.key)
                if found is None:
                    continue
                fingerprint, owner, *answer = msgpack.unpackb(found)
                if fingerprint != claim.fingerprint:
                    message = "this Idempotency-Key came with another request before; take a new one"
                    raise ApiError(409, message, code="idempotency_key_reused")
                if answer:
                    return list(answer)
                if owner == claim.owner:  # an earlier attempt of the write got through
                    return None
                await asyncio.sleep(POLL_S)
        except (RedisError, StoreError, OSError) as error:
            raise ApiError(
                503, f"the store does not answer: {error}", code="store_unavailable", retry_after_s=1
            ) from error
        message = f"the first request with this Idempotency-Key still runs after {WAIT_S:.0f} s"
        raise ApiError(409, message, code="idempotency_in_progress", retry_after_s=5)

    async def _answer(self, claim: Claim, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and store the answer before its last byte is sent."""
        status, kind, parts, size = 0, b"", list[bytes](), 0

        async def keeping(message: Message) -> None:
            nonlocal status, kind, size
            if message["type"] == "http.response.start":
                status, kind = message["status"], dict(message["headers"]).get(b"content-type", b"")
            elif (size := size + len(message.get("body", b""))) <= ANSWER_BYTES:
                parts.append(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await self._keep(claim, status, kind, b"".join(parts) if size <= ANSWER_BYTES else None)
            await send(message)

        renewing = asyncio.create_task(self._renew(claim))
        try:
            await self._app(scope, receive, keeping)
        except BaseException:
            await asyncio.shield(self._drop(claim))
            raise
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _renew(self, claim: Claim) -> None:
        while True:
            await asyncio.sleep(CLAIM_S / 3)
            try:
                await self._client.pexpire(claim.key, int(CLAIM_S * 1000))
            except (RedisError, StoreError, OSError) as error:
                logger.warning("an idempotency claim could not be renewed: %r", error)

    async def _keep(self, claim: Claim, status: int, kind: bytes, body: bytes | None) -> None:
        if body is None or status >= 500 or status in PASSING or _broken(body, kind):
            await self._drop(claim)
            return
        try:
            value = msgpack.packb([claim.fingerprint, claim.owner, status, kind, body])
            await self._client.set(claim.key, value, px=int(ANSWER_S * 1000))
        except (RedisError, StoreError, OSError) as error:
            logger.warning("an answer can't be stored, a retry will be answered anew: %r", error)

    async def _drop(self, claim: Claim) -> None:
        try:
            await self._client.delete(claim.key)
        except (RedisError, StoreError, OSError) as error:
            logger.warning("an idempotency claim stays for up to %.0f s: %r", CLAIM_S, error)


def _broken(body: bytes, kind: bytes) -> bool:
    """Whether a stream ended with an error."""
    last = body.rstrip().rpartition(b"\n\n")[2]
    return kind.startswith(b"text/event-stream") and (
        b"event: error" in last or b"event: response.failed" in last or last.startswith(b'data: {"error"')
    )


def _with_body(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _replay(stored: list[Any], send: Send) -> None:
    status, kind, body = stored
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"idempotency-replayed", b"true"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
