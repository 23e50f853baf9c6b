"""One generation over as many engines as it takes: choose, stream, and go on elsewhere from the tokens received."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from postroad.config.recipe import RouterSection
from postroad_router.engine_client import EngineClient
from postroad_router.engines import Engines
from postroad_router.errors import HEALTHY_FAILURES, ApiError, EngineFailure, EngineRefusal
from postroad_router.generation import GenerationRequest, TokenChunk
from postroad_router.metrics import ENGINE_FAILURES, TOKENS
from postroad_router.model import ModelFacts
from postroad_router.pool import Engine
from postroad_router.splice import Decode, Splice

logger = logging.getLogger(__name__)

NO_ENGINE_S = 30.0  # how long a request waits for the first engine to appear, or for one to come back
BUSY_PAUSE_S = 0.1
BUSY_PAUSE_MAX_S = 2.0


class Dispatcher:
    def __init__(
        self, engines: Engines, client: EngineClient, settings: RouterSection, model: ModelFacts, decode: Decode
    ) -> None:
        self.engines, self._client, self.settings = engines, client, settings
        self._model, self._decode = model, decode

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """The tokens as they come; the last chunk has `finish`. Raises ApiError. Close the iterator to abort."""
        splice = Splice(request, self._model, self._decode)
        deadline_s = time.monotonic() + min(request.timeout_s, self.settings.timeout_s)
        failures: list[str] = []
        tried: frozenset[str] = frozenset()
        engine_name = ""
        while not splice.complete:
            engine = await self.choose(request.minimum_version, tried, deadline_s)
            engine_name = engine.name
            try:
                async with aclosing(self._part(engine, splice, deadline_s)) as part:
                    async for chunk in part:
                        yield chunk
            except TimeoutError as error:
                raise timed_out(request.timeout_s) from error
            except EngineRefusal as refusal:
                raise ApiError(400, f"{engine.name} refuses the request: {refusal}", code="engine_refused") from refusal
            except EngineFailure as failure:
                splice.break_off()
                tried |= {engine.name}
                failures.append(await self.note_failure(engine, failure, len(failures), deadline_s))
                if len(failures) >= self.settings.attempts and not splice.complete:
                    raise exhausted(failures, failure) from failure
        yield TokenChunk([], [], [], engine_name, finish=splice.finish, routed_experts=splice.routed_experts)

    async def _part(self, engine: Engine, splice: Splice, deadline_s: float) -> AsyncGenerator[TokenChunk, None]:
        """What one engine generates."""
        body = splice.begin()
        cost = len(body["input_ids"]) + body["sampling_params"]["max_new_tokens"]
        self.engines.pool.start(engine, cost)
        try:
            async with aclosing(self._client.chunks(engine.url, body, deadline_s)) as chunks:
                async for raw in chunks:
                    chunk = splice.accept(raw, engine.name)
                    TOKENS.inc(len(chunk.tokens))
                    if chunk.tokens:
                        yield replace(chunk, finish=None)
                    if splice.finish is not None and (splice.complete or raw["meta_info"].get("finish_reason") is None):
                        break  # complete, or a stop string that only the splice sees
            if splice.finish is None or (not splice.complete and body["sampling_params"]["max_new_tokens"] == 0):
                raise EngineFailure(
                    "garbage", f"{engine.name} ended without tokens or routed experts that were asked for"
                )
            self.engines.pool.succeed(engine)
        finally:
            self.engines.pool.end(engine, cost)

    async def choose(self, minimum_version: int, tried: frozenset[str], deadline_s: float) -> Engine:
        """An engine, waited for. Raises ApiError 503."""
        patience_s = min(deadline_s, time.monotonic() + NO_ENGINE_S)
        pool = self.engines.pool
        engine = await self.engines.choose(minimum_version, tried, patience_s)
        if engine is None and any(known.version < minimum_version for known in pool.engines.values()):
            engine = await self.engines.choose(minimum_version, tried, deadline_s)
        if engine is not None:
            return engine
        newest = max((known.version for known in pool.engines.values()), default=None)
        if newest is not None and newest < minimum_version:
            raise ApiError(
                503, f"no engine serves version {minimum_version} yet; the newest is {newest}: ask again later",
                code="version_unavailable", retry_after_s=1,
            )  # fmt: skip
        raise ApiError(503, "no engine is ready; ask again later", code="no_engine", retry_after_s=1)

    async def note_failure(self, engine: Engine, failure: EngineFailure, earlier: int, deadline_s: float) -> str:
        """Count and log it, quarantine the engine where it is to blame, or pause where it is only busy."""
        ENGINE_FAILURES.labels(failure.kind).inc()
        logger.warning("engine %s failed (attempt %d): %s", engine.name, earlier + 1, failure)
        if failure.kind not in HEALTHY_FAILURES:
            self.engines.fail(engine)
        else:
            pause_s = min(BUSY_PAUSE_S * 2**earlier, BUSY_PAUSE_MAX_S)
            await asyncio.sleep(max(min(pause_s, deadline_s - time.monotonic()), 0))
        return f"{engine.name}: {failure}"


def exhausted(failures: list[str], last: EngineFailure) -> ApiError:
    busy = last.kind in HEALTHY_FAILURES
    return ApiError(
        503 if busy else 502, f"{len(failures)} attempts failed; the last: {failures[-1]}",
        code="engine_busy" if busy else "engine_failed", retry_after_s=1,
    )  # fmt: skip


def timed_out(timeout_s: float) -> ApiError:
    return ApiError(504, f"the generation took longer than {timeout_s:g} s", code="timeout")
