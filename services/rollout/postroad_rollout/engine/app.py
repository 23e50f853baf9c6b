"""The HTTP interface: SGLang's endpoints over one Engine."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .errors import BadRequestError, EngineBusyError, EngineError
from .loop import Engine
from .metrics import exposition
from .protocol import AbortBody, GenerateBody, PauseBody, UpdateFromDiskBody, VersionBody, check, make_requests
from .request import Request
from .weights import read_folder

MAX_BODY_BYTES = 64 << 20
HEALTH_DEADLINE_S = 20.0
OPEN_PATHS = ("/health", "/metrics")
STATUS = {BadRequestError: 400, EngineBusyError: 503}
routes = APIRouter()


def create_app(engine: Engine) -> FastAPI:
    """The application; the caller starts and closes the engine."""
    app = FastAPI(title="postroad embedded engine", docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.include_router(routes)
    app.middleware("http")(guard)
    app.add_exception_handler(EngineError, on_engine_error)
    return app


async def guard(request: HttpRequest, call_next: Callable[[HttpRequest], Awaitable[Response]]) -> Response:
    """Bearer secret, compared in constant time, and the size of the body."""
    secret = request.app.state.engine.settings.secret
    given = request.headers.get("authorization", "").encode()
    if secret and request.url.path not in OPEN_PATHS and not hmac.compare_digest(given, f"Bearer {secret}".encode()):
        return error(401, "The bearer secret is missing or wrong; send 'Authorization: Bearer SECRET'.")
    if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
        return error(413, f"The body is larger than {MAX_BODY_BYTES} bytes; send fewer prompts at once.")
    return await call_next(request)


async def on_engine_error(_: HttpRequest, exc: Exception) -> Response:
    return error(STATUS.get(type(exc), 400), str(exc))  # type: ignore[call-overload]


def error(status: int, message: str) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error": {"message": message}}, status, headers)


def engine_of(request: HttpRequest) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def body_of(request: HttpRequest) -> Any:
    raw = await request.body()
    try:
        return json.loads(raw or b"{}")
    except ValueError as bad:
        raise BadRequestError(f"The body is not JSON ({bad}); send a JSON object.") from None


def notifier() -> tuple[asyncio.Event, Callable[[], None]]:
    """An event, and the function with which the model loop sets it."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()

    def notify() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    return event, notify


async def finished(requests: list[Request], event: asyncio.Event) -> None:
    """Wait until all have ended; bounded by the engine, which ends every request at close or failure."""
    while any(r.finish is None for r in requests):
        event.clear()
        if all(r.finish is not None for r in requests):
            return
        await event.wait()


async def disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def abort_unfinished(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        if request.finish is None:
            engine.abort(request.rid)


@routes.post("/generate")
async def generate(request: HttpRequest) -> Response:
    engine, body = engine_of(request), check(GenerateBody, await body_of(request))
    event, notify = notifier()
    requests, batched = make_requests(body, engine, notify)
    engine.submit(requests)
    if body.stream:
        return StreamingResponse(stream(engine, requests, batched, event), media_type="text/event-stream")
    waits = [asyncio.create_task(finished(requests, event)), asyncio.create_task(disconnected(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        abort_unfinished(engine, requests)
    answers = [r.answer(engine.tokenizer) for r in requests]
    return JSONResponse(answers if batched else answers[0])


async def stream(engine: Engine, requests: list[Request], batched: bool, event: asyncio.Event) -> AsyncIterator[str]:
    """Server-sent events; each carries all of the output so far, so a slow reader skips some and loses nothing."""
    sent = [-1] * len(requests)
    ended: set[int] = set()
    try:
        while len(ended) < len(requests):
            await event.wait()
            event.clear()
            for i, request in enumerate(requests):
                answer = request.answer(engine.tokenizer)
                final = answer["meta_info"]["finish_reason"] is not None
                if i in ended or (len(answer["output_ids"]) == sent[i] and not final):
                    continue
                sent[i] = len(answer["output_ids"])
                if final:
                    ended.add(i)
                yield f"data: {json.dumps(answer | {'index': i} if batched else answer)}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        abort_unfinished(engine, requests)


@routes.post("/abort_request")
async def abort_request(request: HttpRequest) -> Response:
    body = check(AbortBody, await body_of(request))
    if not body.rid and not body.abort_all:
        raise BadRequestError("rid is empty; name a request or set abort_all.")
    engine_of(request).abort(None if body.abort_all else body.rid)
    return Response()


@routes.post("/pause_generation")
async def pause_generation(request: HttpRequest) -> Any:
    body = check(PauseBody, await body_of(request))
    await asyncio.to_thread(engine_of(request).pause, body.mode)
    return {"message": "Generation paused successfully.", "status": "ok"}


@routes.post("/continue_generation")
async def continue_generation(request: HttpRequest) -> Any:
    await asyncio.to_thread(engine_of(request).resume)
    return {"message": "Generation continued successfully.", "status": "ok"}


@routes.api_route("/flush_cache", methods=["GET", "POST"])
async def flush_cache(request: HttpRequest) -> Response:
    if await asyncio.to_thread(engine_of(request).flush):
        return Response("Cache flushed.")
    return error(400, "Requests are running or waiting; abort them or wait before flushing the cache.")


@routes.get("/health")
async def health(request: HttpRequest) -> Response:
    return Response(status_code=200 if engine_of(request).status.healthy else 503)


@routes.get("/health_generate")
async def health_generate(request: HttpRequest) -> Response:
    """200 if the model makes a token within the deadline (a paused engine does not)."""
    engine = engine_of(request)
    event, notify = notifier()
    body = GenerateBody(input_ids=[0], sampling_params={"max_new_tokens": 1, "temperature": 0})
    requests, _ = make_requests(body, engine, notify)
    engine.submit(requests)
    try:
        await asyncio.wait_for(finished(requests, event), HEALTH_DEADLINE_S)
    except TimeoutError:
        return error(503, f"The model made no token within {HEALTH_DEADLINE_S} s.")
    finally:
        abort_unfinished(engine, requests)
    return Response(status_code=200 if requests[0].output else 503)


@routes.get("/model_info")
async def model_info(request: HttpRequest) -> Any:
    engine = engine_of(request)
    config, status = engine.config, engine.status
    return {
        "model_path": str(engine.settings.model_path),
        "is_generation": True,
        "weight_version": str(status.version),
        "weight_digest": status.digest,
        "architecture": config.architecture,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "max_length": engine.max_length,
        "has_tokenizer": engine.tokenizer is not None,
        "eos_token_ids": sorted(config.eos_token_ids),
        "moe_layers": len(config.moe_layers),
        "moe_layer_ids": list(config.moe_layers),
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
    }


@routes.get("/server_info")
async def server_info(request: HttpRequest) -> Any:
    engine = engine_of(request)
    return {
        "engine": "postroad-embedded",
        **engine.settings.model_dump(mode="json", exclude={"secret"}),
        "load": asdict(engine.status),
        "counters": asdict(engine.counters),
    }


@routes.post("/update_weights_from_disk")
async def update_weights_from_disk(request: HttpRequest) -> Any:
    """Stage the safetensors of a folder and switch to them."""
    engine, body = engine_of(request), check(UpdateFromDiskBody, await body_of(request))
    await asyncio.to_thread(engine.stage, read_folder(Path(body.model_path)))
    pause_ms = await asyncio.to_thread(engine.activate, body.weight_version, body.weight_digest, body.mode)
    return {"success": True, "message": f"Serving version {body.weight_version}.", "pause_ms": pause_ms}


@routes.post("/update_weight_version")
async def update_weight_version(request: HttpRequest) -> Any:
    """Rename the served weights (SGLang's verb); their digest stays."""
    engine, body = engine_of(request), check(VersionBody, await body_of(request))
    if body.abort_all_requests:
        engine.abort(None)
    await asyncio.to_thread(engine.relabel, body.new_version)
    return {"success": True, "message": "Weight version updated.", "new_version": str(body.new_version)}


@routes.get("/metrics")
async def metrics(request: HttpRequest) -> Response:
    return Response(exposition(engine_of(request)), media_type="text/plain; version=0.0.4")
