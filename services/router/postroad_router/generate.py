"""SGLang's /generate, passed through: any body that the engine takes. Retried on another engine while nothing of the
answer has been passed on; going on from received tokens is the chat route's."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from postroad_router.dispatch import Dispatcher, exhausted, timed_out
from postroad_router.engine_client import EngineClient
from postroad_router.errors import ApiError, EngineFailure, EngineRefusal
from postroad_router.openai_types import refuse_code


async def forward(dispatcher: Dispatcher, client: EngineClient, body: dict[str, Any]) -> bytes:
    """The engine's whole answer."""
    async with aclosing(_forward(dispatcher, client, body, whole=True)) as parts:
        return b"".join([part async for part in parts])


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
    minimum_version = body.pop("minimum_version", 0)
    if type(minimum_version) is not int or minimum_version < 0:
        raise ApiError(400, "minimum_version must be a version number", param="minimum_version", code="invalid_value")
    deadline_s = time.monotonic() + dispatcher.settings.timeout_s
    failures: list[str] = []
    tried: frozenset[str] = frozenset()
    while True:
        engine = await dispatcher.choose(minimum_version, tried, deadline_s)
        passed = False
        cost = len(body.get("input_ids") or body.get("text") or ())
        dispatcher.engines.pool.start(engine, cost)
        try:
            async with client.post(engine.url, body, deadline_s) as response:
                received: list[bytes] = []
                while data := await client.read(engine.url, response, deadline_s):
                    if whole:
                        received.append(data)
                    else:
                        yield data
                        passed = True
                if not received and not passed:
                    raise EngineFailure("dropped", f"{engine.url} answered nothing")
            dispatcher.engines.pool.succeed(engine)
            if whole:
                yield b"".join(received)
            return
        except TimeoutError as error:
            raise timed_out(dispatcher.settings.timeout_s) from error
        except EngineRefusal as refusal:
            raise ApiError(refusal.status, f"{engine.name}: {refusal}", code="engine_refused") from refusal
        except EngineFailure as failure:
            tried |= {engine.name}
            failures.append(await dispatcher.note_failure(engine, failure, len(failures), deadline_s))
            if passed or len(failures) >= dispatcher.settings.attempts:
                raise exhausted(failures, failure) from failure
        finally:
            dispatcher.engines.pool.end(engine, cost)
