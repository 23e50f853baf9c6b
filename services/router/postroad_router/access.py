"""Who may come in: the key and the session that a request names, and how many at a time."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from postroad.telemetry.tracing import span_from_headers
from postroad_router import keys
from postroad_router.errors import ApiError
from postroad_router.keys import Identity, Keys
from postroad_router.metrics import IN_FLIGHT, REQUESTS, SECONDS

OPEN = ("/livez", "/readyz")
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate")
MEASURED = (*GENERATING, "/v1/models", "/engines", "/sessions", "/keys")
ADMIN = ("/engines", "/metrics", "/keys")
SESSION_NAME = re.compile(r"[A-Za-z0-9._~-]{1,128}")
SESSION_PATH = re.compile(r"/sessions/([^/]*)(/v1/.*)")

ANTHROPIC_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and the session that it names ("" for none). `generation` names its answer, the same for
    each retry of the request, where the client gives an Idempotency-Key."""

    identity: Identity
    session: str = ""
    generation: str = ""


class Access:
    """ASGI middleware: refuses strangers before their body is read, finds the session, and counts."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

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

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            if scope["path"] not in OPEN:
                scope.setdefault("state", {})["caller"] = await self._caller(scope, headers)
            with span_from_headers("router", headers):
                await self._app(scope, receive, counting)
        except ApiError as refusal:
            body = shaped(scope["path"], refusal)
            await JSONResponse(body, refusal.status, refusal.headers)(scope, receive, counting)
        finally:
            route = next((known for known in MEASURED if scope["path"].startswith(known)), "other")
            REQUESTS.labels(route, str(status)).inc()
            SECONDS.labels(route).observe(time.monotonic() - started)

    async def _caller(self, scope: Scope, headers: dict[str, str]) -> Caller:
        """Raises ApiError. A session in the path leaves it: the routes are the same with and without."""
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        identity, suffix = await self._keys.identity(key), ""
        if identity is None and ":" in key:
            key, _, suffix = key.rpartition(":")
            identity = await self._keys.identity(key)
        if identity is None:
            raise ApiError(401, "the bearer key is missing or wrong; send POSTROAD_KEY", code="invalid_api_key")
        named = {name for name in (suffix, headers.get("x-postroad-session"), identity.session) if name}
        if found := SESSION_PATH.fullmatch(scope["path"]):
            named.add(found[1])
            scope["path"] = found[2]
            scope["raw_path"] = found[2].encode()
        if len(named) > 1:
            raise ApiError(
                403 if identity.session else 400, f"one request, two sessions: {sorted(named)}", code="two_sessions"
            )
        for name in named:
            check_session_name(name)
        if not identity.may(_needed(scope["path"])):
            message = f"a key of scope {identity.scope} may not use {scope['path']}"
            raise ApiError(403, message, code="insufficient_scope")
        return Caller(identity, next(iter(named), ""))


def _needed(path: str) -> keys.Scope:
    if path.startswith(ADMIN):
        return "admin"
    return "worker" if path in ("/generate", "/abort_request") or path.endswith("/trajectories") else "agent"


def check_session_name(name: str) -> None:
    if not SESSION_NAME.fullmatch(name):
        message = f"{name[:80]!r} is no session name: 1 to 128 letters, digits and . _ ~ - make one"
        raise ApiError(400, message, param="session", code="invalid_session")


def shaped(path: str, error: ApiError) -> dict[str, object]:
    """The error as the clients of `path` expect it: Anthropic's there, OpenAI's elsewhere."""
    if not path.startswith("/v1/messages"):
        return error.body
    kind = ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class Admission:
    """ASGI middleware: at most `limit` generations at a time, each until its last byte; the next has to come again."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit, self._inside = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in GENERATING:
            await self._app(scope, receive, send)
            return
        if self._inside >= self._limit:
            message = f"{self._inside} requests are in flight, the most that router.concurrency allows; come again"
            raise ApiError(429, message, code="too_many_requests", retry_after_s=1)
        self._inside += 1
        IN_FLIGHT.set(self._inside)
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
            IN_FLIGHT.set(self._inside)
