"""Who may come in: the bearer key, and how many at a time."""

from __future__ import annotations

import hmac
import time

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from postroad.telemetry.tracing import span_from_headers
from postroad_router.errors import ApiError
from postroad_router.metrics import IN_FLIGHT, REQUESTS, SECONDS

OPEN = ("/livez", "/readyz")
GENERATING = ("/v1/chat/completions", "/generate")
MEASURED = (*GENERATING, "/v1/models", "/engines")


class Access:
    """ASGI middleware: refuses strangers before their body is read, and counts."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        started = time.monotonic()

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"] in OPEN or self._knows(scope):
                with span_from_headers("router", _text_headers(scope)):
                    await self._app(scope, receive, counting)
            else:
                refusal = ApiError(401, "the bearer key is missing or wrong; send POSTROAD_KEY", code="invalid_api_key")
                await JSONResponse(refusal.body, 401)(scope, receive, counting)
        finally:
            route = scope["path"] if scope["path"] in MEASURED else "other"
            REQUESTS.labels(route, str(status)).inc()
            SECONDS.labels(route).observe(time.monotonic() - started)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._key)


def _text_headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


class Admission:
    """ASGI middleware: at most `limit` generations at a time, each until its last byte; the next has to come again."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit, self._inside = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        if self._inside >= self._limit:
            message = f"{self._inside} requests are in flight, the most that router.concurrency allows; come again"
            refusal = ApiError(429, message, code="too_many_requests", retry_after_s=1)
            await JSONResponse(refusal.body, 429, refusal.headers)(scope, receive, send)
            return
        self._inside += 1
        IN_FLIGHT.set(self._inside)
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
            IN_FLIGHT.set(self._inside)
