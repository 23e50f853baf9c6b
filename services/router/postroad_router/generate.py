"""SGLang's /generate, passed through: any body that the engine takes. Retried on another engine while nothing of the
answer has been passed on; going on from received tokens is the chat route's."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from postroad_router.dispatch import Dispatcher, exhausted, timed_out, to_blame
from postroad_router.engine_client import EngineClient
from postroad_router.errors import ApiError, EngineFailure, EngineRefusal
from postroad_router.openai_types import refuse_code
from postroad_router.routing import Wanted

logger = logging.getLogger(__name__)

ABORT_S = 10.0


async def forward(dispatcher: Dispatcher, client: EngineClient, body: dict[str, Any]) -> bytes:
    """The engine's whole answer."""
    async with aclosing(_forward(dispatcher, client, body, whole=True)) as parts:
        return b"".join([part async for part in parts])


async def abort(dispatcher: Dispatcher, client: EngineClient, body: dict[str, Any]) -> int:
    """Tell every engine to end these requests; how many engines have answered."""
    deadline_s = time.monotonic() + ABORT_S

    async def tell(url: str) -> None:
        async with client.post(url, body, deadline_s, path="/abort_request") as response:
            await response.whole()

    engines = list(dispatcher.engines.pool.engines.values())
    outcomes = await asyncio.gather(*(tell(engine.url) for engine in engines), return_exceptions=True)
    for engine, outcome in zip(engines, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            logger.warning("engine %s was not told to abort: %r", engine.name, outcome)
    return sum(outcome is None for outcome in outcomes)


async def forward_stream(
    dispatcher: Dispatcher, client: EngineClient, body: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The engine's events; where it fails midway the last one is an error."""
    started = False
    try:
        async with aclosing(_forward(dispatcher, client, body, whole=False)) as parts:
            async for part in parts:
                yield part
                started = True
    except ApiError as error:
        if not started:
            raise
        yield b"data: " + json.dumps(error.body).encode() + b"\n\n"


async def _forward(
    dispatcher: Dispatcher, client: EngineClient, body: dict[str, Any], *, whole: bool
) -> AsyncGenerator[bytes, None]:
    refuse_code(body)
    wanted, tried = read_wanted(body), frozenset[str]()
    deadline_s = time.monotonic() + dispatcher.settings.timeout_s
    failures: list[str] = []
    while True:
        route = await dispatcher.choose(replace(wanted, avoid=tried), deadline_s)
        passed = False
        try:
            async with dispatcher.open(route, body, wanted.tokens, deadline_s) as response:
                if whole:
                    answer = await response.whole()
                    if not answer:
                        raise EngineFailure("dropped", f"{route.engine.url} answered nothing")
                    yield answer
                    return
                while data := await response.read():
                    yield data
                    passed = True
            return
        except TimeoutError as error:
            raise timed_out(dispatcher.settings.timeout_s) from error
        except EngineRefusal as refusal:
            raise ApiError(refusal.status, f"{route.engine.name}: {refusal}", code="engine_refused") from refusal
        except EngineFailure as failure:
            tried |= to_blame(route, failure)
            failures.append(await dispatcher.note_failure(route, failure, len(failures), deadline_s))
            if passed or len(failures) >= dispatcher.settings.attempts:
                raise exhausted(failures, failure) from failure


def read_wanted(body: dict[str, Any]) -> Wanted:
    """What the body asks of the choice of an engine; postroad's own fields are taken out of it. Raises ApiError 400."""
    for name in body:
        if name.startswith("bootstrap_"):
            raise ApiError(400, f"{name} is the router's to set", param=name, code="forbidden_parameter")
    versions = {name: body.pop(name, None) for name in ("minimum_version", "version")}
    for name, value in versions.items():
        if value is not None and (type(value) is not int or value < 0):
            raise ApiError(400, f"{name} must be a version number", param=name, code="invalid_value")
    ids, sampling, start = body.get("input_ids"), body.get("sampling_params"), body.get("logprob_start_len")
    prompt = ids if isinstance(ids, list) and all(type(token) is int for token in ids) else []
    new = sampling.get("max_new_tokens") if isinstance(sampling, dict) else None
    scoring = (type(start) is int and start >= 0) or new == 0
    tokens = len(ids or body.get("text") or ()) + (new if type(new) is int else 0)
    return Wanted(prompt, tokens, versions["minimum_version"] or 0, versions["version"], whole=scoring)
