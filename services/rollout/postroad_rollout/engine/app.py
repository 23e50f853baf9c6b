"""The engine over HTTP: SGLang's endpoints as far as the router, the worker and the weight plane need them."""

from __future__ import annotations

import asyncio
import hmac
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Literal

import msgpack
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, Field

from .body import GenerateBody, read_body, requests_of
from .engine import Engine, PauseMode
from .errors import ActivationError, BadRequestError, EngineBusyError, EngineError, HandoverError
from .handover import ROOM_S, Bootstrap, Room, fetch
from .request import Request

OPEN = ("/health", "/livez", "/readyz")
PROBE_S = 20.0
MSGPACK = "application/msgpack"


class Abort(BaseModel):
    rid: str = ""
    abort_all: bool = False


class Pause(BaseModel):
    mode: PauseMode = "abort"


class NewVersion(BaseModel):
    new_version: int = Field(ge=0)
    abort_all_requests: bool = False


class _Metrics:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> list[Metric]:
        counters, load = self.engine.scheduler.counters, self.engine.load()
        values = {name: getattr(counters, name) for name in (
            "steps", "prompt_tokens", "cached_tokens", "prefill_tokens", "generated_tokens"
        )}  # fmt: skip
        metrics: list[Metric] = [
            CounterMetricFamily(f"postroad_engine_{name}", name.replace("_", " "), value=value)
            for name, value in values.items()
        ]
        metrics += [
            GaugeMetricFamily(f"postroad_engine_{name}", f"requests or tokens {name}", value=value)
            for name, value in {**load, "weight_version": self.engine.version}.items()
        ]
        return metrics


def create_app(engine: Engine, bootstrap: Bootstrap, ready: Callable[[], bool] = lambda: True) -> FastAPI:
    """The application of a started engine. `ready` says whether /readyz and /health are good; `bootstrap` is open
    where the engine's role is prefill."""
    app = FastAPI(title="postroad engine", docs_url=None, redoc_url=None)
    _guard(app, engine.settings.secret)
    _add_generation(app, engine, bootstrap)
    _add_control(app, engine)
    _add_information(app, engine, ready)
    return app


def _guard(app: FastAPI, secret: str | None) -> None:
    @app.middleware("http")
    async def check(request: HttpRequest, call_next: Callable[[HttpRequest], Awaitable[Response]]) -> Response:
        if secret and request.url.path not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), secret.encode()):
                return _error(401, "this engine needs the mesh's bearer key")
        return await call_next(request)

    @app.exception_handler(EngineError)
    async def explain(_: HttpRequest, error: Exception) -> Response:
        if isinstance(error, (EngineBusyError, HandoverError)):
            return _error(503, str(error), {"Retry-After": "1"})
        return _error(409 if isinstance(error, ActivationError) else 400, str(error))


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


def _add_generation(app: FastAPI, engine: Engine, bootstrap: Bootstrap) -> None:
    @app.post("/generate")
    async def generate(request: HttpRequest) -> Response:
        try:
            raw = json.loads(await request.body())
        except ValueError as error:
            raise BadRequestError(f"the body is not JSON: {error}") from error
        body, wake = read_body(raw), asyncio.Event()
        requests = requests_of(engine, body, wake)
        if engine.settings.role != "prefill":
            await _take_handovers(engine, requests)
        try:
            for one in requests:
                engine.submit(one)
        except EngineBusyError:  # all of a batch or nothing of it
            await _abort_unfinished(engine, requests)
            raise
        if engine.settings.role == "prefill":
            return JSONResponse(await _prefill(request, engine, bootstrap, requests, wake))
        if body.stream and MSGPACK in request.headers.get("accept", "") and not body.batched:
            return StreamingResponse(_frames(engine, requests[0], wake), media_type=MSGPACK)
        if body.stream:
            return StreamingResponse(_stream(engine, body, requests, wake), media_type="text/event-stream")
        try:
            await _finished(request, requests, wake)
        finally:
            await _abort_unfinished(engine, requests)
        answers = [one.answer(engine.tokenizer) for one in requests]
        return JSONResponse(answers if body.batched else answers[0])

    @app.post("/abort_request")
    async def abort(body: Abort) -> dict[str, int]:
        return {"aborted": await asyncio.to_thread(engine.abort, None if body.abort_all else body.rid)}


async def _finished(http: HttpRequest, requests: list[Request], wake: asyncio.Event) -> None:
    """Until all are finished, or the client is gone."""
    while any(one.finish is None for one in requests):
        wake.clear()
        try:
            await asyncio.wait_for(wake.wait(), 1.0)
        except TimeoutError:
            if await http.is_disconnected():
                return


async def _stream(
    engine: Engine, body: GenerateBody, requests: list[Request], wake: asyncio.Event
) -> AsyncIterator[bytes]:
    """SGLang's stream: each event holds the answer so far; of a batch, with its index."""
    sent, over = [-1] * len(requests), [False] * len(requests)
    try:
        while not all(over):
            wake.clear()
            for index, one in enumerate(requests):
                finished = one.finish is not None
                news = len(one.output) - max(sent[index], 0)
                if over[index] or (not finished and news < one.params.stream_interval):
                    continue
                answer = one.answer(engine.tokenizer)
                sent[index], over[index] = len(answer["output_ids"]), answer["meta_info"]["finish_reason"] is not None
                yield b"data: " + json.dumps({**answer, "index": index} if body.batched else answer).encode() + b"\n\n"
            if not all(over):
                await wake.wait()
        yield b"data: [DONE]\n\n"
    finally:
        await _abort_unfinished(engine, requests)


async def _frames(engine: Engine, one: Request, wake: asyncio.Event) -> AsyncIterator[bytes]:
    """The same as frames of a 4-byte length and a msgpack map: new tokens alone, experts as bytes."""
    sent, finished = 0, False
    try:
        while not finished:
            wake.clear()
            finished = one.finish is not None
            if finished or len(one.output) - sent >= one.params.stream_interval:
                news = one.news(sent)
                sent, finished = news["meta_info"]["completion_tokens"], news["meta_info"]["finish_reason"] is not None
                data = msgpack.packb(news)
                yield struct.pack("<I", len(data)) + data
            if not finished:
                await wake.wait()
    finally:
        await _abort_unfinished(engine, [one])


async def _take_handovers(engine: Engine, requests: list[Request]) -> None:
    async def take(one: Request) -> None:
        if one.address is not None:
            one.handover = await fetch(one.address, engine.settings.secret, one.prompt[:-1])

    await asyncio.gather(*(take(one) for one in requests))


async def _prefill(
    http: HttpRequest, engine: Engine, bootstrap: Bootstrap, requests: list[Request], wake: asyncio.Event
) -> Any:
    """Compute the prompts and hand them over; the answer once they are fetched."""
    try:
        async with AsyncExitStack() as stack:
            rooms = [
                await stack.enter_async_context(bootstrap.room(one.address.room)) for one in requests if one.address
            ]
            await _finished(http, requests, wake)
            await asyncio.gather(*(_hand_over(one, room) for one, room in zip(requests, rooms, strict=True)))
    finally:
        await _abort_unfinished(engine, requests)
    answers = [one.answer(engine.tokenizer) for one in requests]
    return answers if len(answers) > 1 else answers[0]


async def _hand_over(one: Request, room: Room) -> None:
    if one.handover is None:
        raise HandoverError(f"the prompt was not computed: {one.finish}")
    room.offered.set_result(one.handover)
    one.handover = None
    try:
        fault = await asyncio.wait_for(room.fetched, ROOM_S)
    except TimeoutError as error:
        raise HandoverError(f"no decode engine came within {ROOM_S:.0f} s") from error
    if fault:
        raise HandoverError(fault)


async def _abort_unfinished(engine: Engine, requests: list[Request]) -> None:
    for one in requests:
        if one.finish is None and engine.failure is None:
            await asyncio.shield(asyncio.to_thread(engine.abort, one.rid, "the client is gone"))


def _add_control(app: FastAPI, engine: Engine) -> None:
    done = {"success": True}

    @app.post("/pause_generation")
    async def pause(body: Pause) -> dict[str, Any]:
        await asyncio.to_thread(engine.pause, body.mode)
        return done

    @app.post("/continue_generation")
    async def resume() -> dict[str, Any]:
        await asyncio.to_thread(engine.resume)
        return done

    @app.post("/flush_cache")
    async def flush() -> dict[str, Any]:
        await asyncio.to_thread(engine.flush_cache)
        return done

    @app.post("/update_weight_version")
    async def rename(body: NewVersion) -> dict[str, Any]:
        if body.abort_all_requests:
            await asyncio.to_thread(engine.abort, None)
        await asyncio.to_thread(engine.rename, body.new_version)
        return {**done, "new_version": body.new_version}


def _add_information(app: FastAPI, engine: Engine, ready: Callable[[], bool]) -> None:
    registry = CollectorRegistry()
    registry.register(_Metrics(engine))  # type: ignore[arg-type]

    @app.get("/livez")
    async def livez() -> Response:
        return Response(status_code=200 if engine.failure is None else 503)

    @app.get("/readyz")
    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.failure is None and ready() else 503)

    @app.get("/health_generate")
    async def health_generate() -> Response:
        wake = asyncio.Event()
        body = GenerateBody(input_ids=[0], sampling_params={"max_new_tokens": 1, "temperature": 0})
        (one,) = requests_of(engine, body, wake)
        engine.submit(one)
        try:
            await asyncio.wait_for(wake.wait(), PROBE_S)
        except TimeoutError:
            return Response(status_code=503)
        finally:
            await _abort_unfinished(engine, [one])
        return Response(status_code=200)

    @app.get("/model_info")
    async def model_info() -> dict[str, Any]:
        config = engine.config
        kind: Literal["float32", "bfloat16"] = "float32" if "float32" in str(engine.dtype) else "bfloat16"
        return {
            "model_path": str(engine.settings.model_path), "architecture": config.architecture, "dtype": kind,
            "weight_version": str(engine.version), "weight_digest": engine.digest, "max_length": engine.max_length,
            "vocab_size": config.vocab_size, "moe_layers": list(config.moe_layers), "experts": config.experts,
            "experts_per_token": config.top_k, "is_generation": True,
        }  # fmt: skip

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry) + generate_latest(), media_type=CONTENT_TYPE_LATEST)
