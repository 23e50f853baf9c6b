"""One generation over as many engines as it takes: choose, stream, and go on elsewhere from the tokens received."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import orjson

from postroad.config.recipe import RouterSection
from postroad_router.engine_client import MSGPACK, EngineClient, Response
from postroad_router.engines import Engines
from postroad_router.errors import HEALTHY_FAILURES, ApiError, EngineFailure, EngineRefusal
from postroad_router.generation import GenerationRequest, TokenChunk
from postroad_router.metrics import ENGINE_FAILURES, TOKENS, UNMATCHED
from postroad_router.model import ModelFacts
from postroad_router.routing import Route, Wanted
from postroad_router.splice import Decode, Splice

logger = logging.getLogger(__name__)

NO_ENGINE_S = 30.0  # how long a request waits for the first engine to appear, or for one to come back
BUSY_PAUSE_S = 0.1
BUSY_PAUSE_MAX_S = 2.0
EVENTS = "text/event-stream"


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
            prompt = [*request.prompt, *splice.tokens] if splice.tokens else request.prompt
            tokens = len(request.prompt) + request.max_new_tokens
            wanted = Wanted(prompt, tokens, request.minimum_version, request.version, request.session, tried)
            route = await self.choose(wanted, deadline_s)
            engine_name = route.engine.name
            body = splice.begin()
            try:
                async with self.open(route, body, tokens, deadline_s, accept=f"{MSGPACK}, {EVENTS}") as response:
                    while chunks := await self._next(splice, response, engine_name):
                        for chunk in chunks:
                            yield chunk
                    if splice.finish is None or (
                        not splice.complete and body["sampling_params"]["max_new_tokens"] == 0
                    ):
                        raise EngineFailure(
                            "garbage", f"{engine_name} ended without tokens or experts that were asked for"
                        )
            except TimeoutError as error:
                raise timed_out(request.timeout_s) from error
            except EngineRefusal as refusal:
                raise ApiError(400, f"{engine_name} refuses the request: {refusal}", code="engine_refused") from refusal
            except EngineFailure as failure:
                splice.break_off()
                tried |= to_blame(route, failure)
                failures.append(await self.note_failure(route, failure, len(failures), deadline_s))
                if len(failures) >= self.settings.attempts and not splice.complete:
                    raise exhausted(failures, failure) from failure
        UNMATCHED.inc(len(splice.unmatched))
        yield TokenChunk(
            [], [], [], engine_name, finish=splice.finish, routed_experts=splice.routed_experts,
            unmatched=tuple(sorted(splice.unmatched)),
        )  # fmt: skip

    async def _next(self, splice: Splice, response: Response, engine: str) -> list[TokenChunk]:
        """What the engine generates next; nothing once it has done all that it can."""
        while not response.done:
            chunks: list[TokenChunk] = []
            raws = await response.chunks()
            response.done = not raws
            for raw in raws:
                try:
                    chunk = splice.accept(raw, engine)
                except EngineFailure as failure:
                    if not chunks:
                        raise
                    response.failure = failure  # after what has been accepted
                    break
                if chunk.tokens:
                    chunks.append(chunk)
                response.ending = raw["meta_info"].get("finish_reason") is not None
                if splice.finish is not None and (splice.complete or not response.ending):
                    response.done = True  # complete, or a stop string that only the splice sees
                    break
            if chunks:
                TOKENS.inc(sum(len(chunk.tokens) for chunk in chunks))
                return chunks
        return []

    @asynccontextmanager
    async def open(
        self, route: Route, body: dict[str, Any], tokens: int, deadline_s: float, *, accept: str = EVENTS
    ) -> AsyncIterator[Response]:
        """The open answer to /generate. Where the route is a pair, both engines get the body with a room to hand the
        prompt over in, and the decode engine's answer is open once the prefill engine has done its part."""
        pool = self.engines.pool
        costs = [tokens] if route.prefill is None else [len(body.get("input_ids") or ()), tokens]
        for engine, cost in zip(route.engines, costs, strict=True):
            pool.start(engine, cost)
        try:
            if route.prefill is None:
                async with self._client.post(route.engine.url, body, deadline_s, accept) as response:
                    yield response
            else:
                async with AsyncExitStack() as stack:
                    yield await self._open_pair(stack, route, body, deadline_s, accept)
            for engine in route.engines:
                pool.succeed(engine)
        finally:
            for engine, cost in zip(route.engines, costs, strict=True):
                pool.end(engine, cost)

    async def _open_pair(
        self, stack: AsyncExitStack, route: Route, body: dict[str, Any], deadline_s: float, accept: str
    ) -> Response:
        assert route.prefill is not None
        paired = body | bootstrap(route.prefill.url, route.prefill.bootstrap_port, body)
        prefill = asyncio.create_task(self._prefill(route, paired, deadline_s))
        decode = asyncio.create_task(
            stack.enter_async_context(self._client.post(route.engine.url, paired, deadline_s, accept))
        )
        try:
            await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_EXCEPTION)
            for half in (prefill, decode):  # where both failed, the prefill engine's word counts
                if half.done() and half.exception() is not None:
                    half.result()
            await prefill
            return await decode
        finally:
            for half in (prefill, decode):
                half.cancel()
            await asyncio.gather(prefill, decode, return_exceptions=True)

    async def _prefill(self, route: Route, body: dict[str, Any], deadline_s: float) -> None:
        """Raises EngineFailure, where the prompt was computed with other weights than chosen too."""
        assert route.prefill is not None
        name, version = route.prefill.name, route.engine.version
        try:
            async with self._client.post(route.prefill.url, {**body, "stream": False}, deadline_s) as response:
                answer = orjson.loads(await response.whole())
            answers = answer if isinstance(answer, list) else [answer]
            found = {int(one["meta_info"]["weight_version"]) for one in answers}
        except EngineFailure as failure:
            raise EngineFailure(failure.kind, f"prefill: {failure}", prefill=True) from failure
        except (ValueError, KeyError, TypeError) as error:
            raise EngineFailure("garbage", f"{name} sent no answer to a prefill: {error!r}", prefill=True) from error
        if found != {version}:
            raise EngineFailure(
                "aborted", f"{name} computed the prompt with version {found}, not {version}", prefill=True
            )

    async def choose(self, wanted: Wanted, deadline_s: float) -> Route:
        """A route, waited for. Raises ApiError 409 where the version is gone, and 503."""
        patience_s = min(deadline_s, time.monotonic() + NO_ENGINE_S)
        engines = self.engines.pool.engines
        route = await self.engines.choose(wanted, patience_s)
        if route is None and engines and not any(wanted.allows(engine.version) for engine in engines.values()):
            route = await self.engines.choose(wanted, deadline_s)
        if route is None:
            raise unavailable(wanted, self.engines)
        return route

    async def note_failure(self, route: Route, failure: EngineFailure, earlier: int, deadline_s: float) -> str:
        """Count and log it, quarantine the engine where it is to blame, or pause where it is only busy."""
        engine = route.prefill if failure.prefill and route.prefill is not None else route.engine
        ENGINE_FAILURES.labels(failure.kind).inc()
        logger.warning("engine %s failed (attempt %d): %s", engine.name, earlier + 1, failure)
        if failure.kind not in HEALTHY_FAILURES:
            self.engines.fail(engine)
        else:
            pause_s = min(BUSY_PAUSE_S * 2**earlier, BUSY_PAUSE_MAX_S)
            await asyncio.sleep(max(min(pause_s, deadline_s - time.monotonic()), 0))
        return f"{engine.name}: {failure}"


def to_blame(route: Route, failure: EngineFailure) -> frozenset[str]:
    """Of a pair the half that failed, or both where it may have been either."""
    halves = {True: route.prefill or route.engine, False: route.engine}
    return route.names if failure.kind in HEALTHY_FAILURES else frozenset({halves[failure.prefill].name})


def bootstrap(prefill_url: str, port: int, body: dict[str, Any]) -> dict[str, Any]:
    """SGLang's fields of a request that is split: where the halves meet. A batch has a room for each prompt."""
    host, room = urlsplit(prefill_url).hostname, secrets.randbits(62)
    ids, text = body.get("input_ids"), body.get("text")
    batch = (
        text if isinstance(text, list) else ids if isinstance(ids, list) and ids and isinstance(ids[0], list) else None
    )
    if batch is None:
        return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}
    count = len(batch)
    rooms = [room + place for place in range(count)]
    return {"bootstrap_host": [host] * count, "bootstrap_port": [port] * count, "bootstrap_room": rooms}


def unavailable(wanted: Wanted, engines: Engines) -> ApiError:
    """Why no engine takes the request, with a code for machines."""
    known = engines.pool.engines.values()
    newest = max((engine.version for engine in known), default=None)
    if wanted.gone(known):
        message = f"no engine serves version {wanted.version} any more; the newest is {newest}"
        return ApiError(409, message, code="version_gone", param="version")
    if newest is not None and not any(wanted.allows(engine.version) for engine in known):
        asked = f"{wanted.minimum_version} or newer" if wanted.version is None else str(wanted.version)
        message = f"no engine serves version {asked} yet; the newest is {newest}: ask again later"
        return ApiError(503, message, code="version_unavailable", retry_after_s=1)
    return ApiError(503, "no engine is ready; ask again later", code="no_engine", retry_after_s=1)


def exhausted(failures: list[str], last: EngineFailure) -> ApiError:
    busy = last.kind in HEALTHY_FAILURES
    return ApiError(
        503 if busy else 502, f"{len(failures)} attempts failed; the last: {failures[-1]}",
        code="engine_busy" if busy else "engine_failed", retry_after_s=1,
    )  # fmt: skip


def timed_out(timeout_s: float) -> ApiError:
    return ApiError(504, f"the generation took longer than {timeout_s:g} s", code="timeout")
