"""The routes: check, admit, hand on, answer. No decisions about engines or tokens here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from postroad_router import documents, sessions_api
from postroad_router.access import GENERATING, Access, Admission, shaped
from postroad_router.bodies import read_body
from postroad_router.completions import ChatAnswer, TextAnswer
from postroad_router.documents import told
from postroad_router.errors import ApiError
from postroad_router.exchange import complete, converse, count
from postroad_router.generate import abort, forward, forward_stream
from postroad_router.idempotency import Idempotency
from postroad_router.messages_api import CountRequest, MessagesAnswer, MessagesRequest, chat_request
from postroad_router.metrics import ENGINES
from postroad_router.openai_types import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    read_chat,
    validated,
)
from postroad_router.parts import Parts
from postroad_router.responses_api import ResponsesAnswer, ResponsesRequest

logger = logging.getLogger(__name__)

CLIENT_GONE = 499

Result = TypeVar("Result")
routes = APIRouter()


def create_app(parts: Parts) -> FastAPI:
    app = FastAPI(
        title="postroad router", docs_url=None, redoc_url=None, openapi_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # Access has the span; four are too many
    )  # fmt: skip
    app.state.parts = parts
    for route in routes.routes:  # FastAPI's own way to these costs a fifth of a millisecond
        if isinstance(route, APIRoute) and route.path in GENERATING:
            app.router.routes.append(Route(route.path, route.endpoint, methods=["POST"]))
    app.include_router(routes)
    app.include_router(sessions_api.routes)
    app.add_middleware(Admission, limit=parts.dispatcher.settings.concurrency)
    app.add_middleware(Idempotency, store=parts.dispatcher.engines.store)
    app.add_middleware(Access, keys=parts.keys)  # the outermost
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _server_error)
    return app


@routes.post("/v1/chat/completions", openapi_extra=told(ChatRequest, documents.ChatCompletion))
async def chat_completions(request: Request) -> Response:
    exchange = await converse(request.app.state.parts, read_chat(await read_body(request)), request.state.caller)
    return await _answer(request, ChatAnswer(exchange))


@routes.post("/v1/completions", openapi_extra=told(CompletionRequest, documents.TextCompletion))
async def completions(request: Request) -> Response:
    exchange = await complete(request.app.state.parts, validated(CompletionRequest, await read_body(request)))
    return await _answer(request, TextAnswer(exchange))


@routes.post("/v1/messages", openapi_extra=told(MessagesRequest, documents.AnthropicMessage))
async def messages(request: Request) -> Response:
    """Anthropic's Messages API."""
    chat = chat_request(await read_body(request))
    return await _answer(request, MessagesAnswer(await converse(request.app.state.parts, chat, request.state.caller)))


@routes.post("/v1/messages/count_tokens", openapi_extra=told(CountRequest, documents.TokenCount))
async def count_tokens(request: Request) -> dict[str, int]:
    chat = chat_request(await read_body(request), CountRequest)
    return {"input_tokens": await count(request.app.state.parts, chat)}


@routes.post("/v1/responses", openapi_extra=told(ResponsesRequest, documents.OpenAIResponse))
async def responses(request: Request) -> Response:
    """OpenAI's Responses API."""
    parts, caller = request.app.state.parts, request.state.caller
    answer = await ResponsesAnswer.open(await read_body(request), parts.responses, caller.identity.name)
    answer.exchange = await converse(parts, answer.asked, caller)
    return await _answer(request, answer)


@routes.get("/v1/responses/{name}")
async def response(request: Request, name: str) -> dict[str, Any]:
    found: dict[str, Any] = await request.app.state.parts.responses.response(name, request.state.caller.identity.name)
    return found


@routes.delete("/v1/responses/{name}")
async def delete_response(request: Request, name: str) -> dict[str, Any]:
    await request.app.state.parts.responses.delete(name, request.state.caller.identity.name)
    return {"id": name, "object": "response", "deleted": True}


@routes.post("/generate", openapi_extra=told(GenerateRequest, documents.Generation))
async def generate(request: Request) -> Response:
    """SGLang's own contract: the body goes to an engine as it is."""
    parts: Parts = request.app.state.parts
    body = await read_body(request)
    if validated(GenerateRequest, body).stream:
        return await EventStream.start(request, forward_stream(parts.dispatcher, parts.client, body))
    answer = forward(parts.dispatcher, parts.client, body)
    return Response(await until_gone(request.receive, answer), media_type="application/json")


@routes.post("/abort_request", openapi_extra=told(AbortRequest))
async def abort_request(request: Request) -> dict[str, int]:
    """SGLang's: end a request of /generate by its `rid`. A client that hangs up ends its own."""
    parts: Parts = request.app.state.parts
    asked = validated(AbortRequest, await read_body(request))
    if asked.abort_all and not request.state.caller.identity.may("admin"):
        raise ApiError(403, "abort_all is for administrators", param="abort_all", code="insufficient_scope")
    if not asked.abort_all and not asked.rid:
        raise ApiError(400, "rid must name a request", param="rid", code="invalid_value")
    return {"engines": await abort(parts.dispatcher, parts.client, asked.model_dump())}


@routes.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> dict[str, Any]:
    return documents.document(request.app)


@routes.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request.app.state.parts, name) for name in request.app.state.parts.names]}


@routes.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    if name not in request.app.state.parts.names:
        raise ApiError(404, f"The model `{name}` does not exist.", param="model", code="model_not_found")
    return _model(request.app.state.parts, name)


@routes.get("/engines")
async def engines(request: Request) -> dict[str, Any]:
    now = time.monotonic()
    return {
        "engines": [
            {
                "name": e.name, "url": e.url, "pid": e.pid, "version": e.version, "digest": e.digest, "state": e.state,
                "slots": e.slots, "running": e.running, "requests": e.requests, "tokens": e.tokens,
                "failures": e.failures, "healthy": e.quarantined_until is None,
                "quarantined_s": 0.0 if e.quarantined_until is None else min(max(e.quarantined_until - now, 0.0), 60.0),
            }
            for e in request.app.state.parts.dispatcher.engines.pool.engines.values()
        ]
    }  # fmt: skip


@routes.get("/livez")
async def livez() -> Response:
    return Response("ok\n")


@routes.get("/readyz")
async def readyz(request: Request) -> Response:
    ready = request.app.state.parts.ready
    return Response("ok\n" if ready else "not ready\n", status_code=200 if ready else 503)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    known = list(request.app.state.parts.dispatcher.engines.pool.engines.values())
    quarantined = sum(engine.quarantined_until is not None for engine in known)
    ENGINES.labels("quarantined").set(quarantined)
    ENGINES.labels("healthy").set(len(known) - quarantined)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


# ── bodies, streams and clients that leave ───────────────────────────────────────────────────────────────────────
async def until_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled where the client leaves before it is done."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal gone
        if not over:
            gone = True
            task.cancel()

    over = False
    leaving = asyncio.ensure_future(_gone(receive))
    leaving.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone or task.uncancel():
            raise
        raise ApiError(CLIENT_GONE, "the client closed the connection", code="client_gone") from None
    finally:
        over = True
        leaving.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `start` waits for the first one, so that an error before it has a status of its own; a
    client that leaves at any time ends the work."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first, self._events = first, events

    @classmethod
    async def start(cls, request: Request, events: AsyncGenerator[bytes, None]) -> EventStream:
        return cls(await until_gone(request.receive, anext(events)), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except ApiError as error:
            logger.info("a stream ended early: %s", error.message)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Written(Protocol):
    """An answer in the shape of one API."""

    asked: Any

    async def whole(self) -> dict[str, Any]: ...

    def events(self) -> AsyncGenerator[bytes, None]: ...


async def _answer(request: Request, answer: Written) -> Response:
    if answer.asked.stream:
        return await EventStream.start(request, answer.events())
    whole = orjson.dumps(await until_gone(request.receive, answer.whole()))
    return Response(whole, media_type="application/json")


def _model(parts: Parts, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": parts.started, "owned_by": "postroad"}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(shaped(request.url.path, error), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(request, ApiError(error.status_code, message, code="unknown_url"))


async def _server_error(request: Request, _: Exception) -> Response:
    """The client gets no details; the server logs the traceback."""
    return await _api_error(request, ApiError(500, "the router failed; its log says why", code="internal_error"))
