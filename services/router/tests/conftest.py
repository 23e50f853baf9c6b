"""A router as a real service on a real Valkey, and stub engines that can be told to fail."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from aiohttp import web
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from postroad.config import Environment, Recipe
from postroad.store import Store
from postroad_router.service import RouterService

KEY = "mesh-key"
RUN = "router-test"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
IDS = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(folder: Path) -> Path:
    """Tokenizer and configuration of a character-level MoE model, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[2], "chat_template": TEMPLATE}))
    (folder / "config.json").write_text(json.dumps({
        "vocab_size": len(IDS), "eos_token_id": 2, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3,
        "mlp_only_layers": [0], "decoder_sparse_step": 1,
    }))  # fmt: skip
    return folder


@dataclass
class StubEngine:
    """Speaks SGLang's /generate. The token at position p of a sequence depends on p and the seed alone, its
    log-probability on p and the version, its experts are all `mark`. Faults: `die_after` tokens the connection breaks
    (once), `status` is answered instead, `garbage` is sent, `lies` is given as the version, the last row of experts is
    lost (`loses_experts`), nothing is said until `hold` is set, and probes are answered as `healthy` says."""

    name: str
    version: int = 1
    mark: int = 0
    incremental: bool = False
    says: str = ""
    pause_s: float = 0.0
    die_after: int | None = None
    status: int | None = None
    garbage: bytes | None = None
    healthy: bool = True
    hold: asyncio.Event | None = None
    lies: int | None = None
    loses_experts: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    probes: int = 0
    aborted: int = 0
    url: str = ""
    runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/health", self.health)
        app.router.add_post("/abort_request", self.abort)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def health(self, request: web.Request) -> web.Response:
        self.probes += 1
        return web.Response(status=200 if self.healthy else 503)

    async def abort(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        return web.Response()

    def token(self, position: int, start: int, seed: int) -> int:
        place = position - start
        if self.says:
            return IDS[self.says[place]] if place < len(self.says) else 2
        return IDS["abcdefghijklmnopqrstuvwxyz"[(position * 7 + seed) % 26]]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        body = await request.json()
        self.requests.append(body)
        if self.status is not None:
            return web.json_response({"error": {"message": "told to fail"}}, status=self.status)
        if not body.get("stream"):
            return web.json_response({"text": "whole", "output_ids": [5], "meta_info": {"engine": self.name}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            if self.hold is not None:
                await self.hold.wait()
            await self._stream(request, response, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, body: dict[str, Any]) -> None:
        sampling, prompt = body["sampling_params"], body["input_ids"]
        start = max((place for place, token in enumerate(prompt) if token == IDS["\n"]), default=-1) + 1
        tokens: list[int] = []
        entries: list[list[Any]] = []
        finish: dict[str, Any] | None = None
        while finish is None:
            position = len(prompt) + len(tokens)
            if sampling["max_new_tokens"] > 0:
                tokens.append(self.token(position, start, sampling.get("sampling_seed", 0)))
                entries.append([-0.01 * position - self.version, tokens[-1], None])
            text = "".join((*SPECIAL, *CHARACTERS)[token] for token in tokens)
            if tokens and (tokens[-1] == 2 or any(stop in text for stop in sampling["stop"])):
                finish = {"type": "stop"}
            elif len(tokens) >= sampling["max_new_tokens"]:
                finish = {"type": "length", "length": len(tokens)}
            if self.die_after is not None and len(tokens) > self.die_after:
                self.die_after = None
                request.transport.abort()  # type: ignore[union-attr]
                return
            chunk = self._chunk(body, tokens, entries, finish)
            await response.write(b"data: " + (self.garbage or json.dumps(chunk).encode()) + b"\n\n")
            await asyncio.sleep(self.pause_s)
        await response.write(b"data: [DONE]\n\n")

    def _chunk(self, body: Any, tokens: list[int], entries: list[Any], finish: Any) -> dict[str, Any]:
        shown = slice(-1 if self.incremental and tokens else 0, None)
        version = self.version if self.lies is None else self.lies
        meta: dict[str, Any] = {
            "finish_reason": finish, "completion_tokens": len(tokens), "output_token_logprobs": entries[shown],
            "weight_version": str(version), "weight_versions": [[0, len(tokens), version]],
            "weight_digests": {str(version): f"digest-{version}"},
        }  # fmt: skip
        if body.get("top_logprobs_num"):
            meta["output_top_logprobs"] = [
                [entry, [-9.0, 4, None]][: body["top_logprobs_num"]] for entry in entries[shown]
            ]
        if finish and body.get("return_routed_experts"):
            start = body.get("routed_experts_start_len", 0)
            count = len(body["input_ids"]) + len(tokens) - 1 - self.loses_experts - start
            rows = np.full((count, 2, 2), self.mark, dtype="<i4")
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return {"text": "", "output_ids": tokens[shown], "meta_info": meta}

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()


@dataclass
class Mesh:
    """A running router, its store, and the engines that are registered there."""

    url: str
    store: Store
    service: RouterService
    client: openai.AsyncOpenAI
    engines: dict[str, StubEngine] = field(default_factory=dict)
    verify: Any = True

    async def add(self, engine: StubEngine, **info: Any) -> StubEngine:
        await engine.start()
        self.engines[engine.name] = engine
        await self.register(engine, **info)
        return engine

    async def register(self, engine: StubEngine, **info: Any) -> None:
        details = {"url": engine.url, "pid": 1, "version": engine.version, "digest": f"digest-{engine.version}",
                   "state": "ready", "slots": 8, "running": 0, **info}  # fmt: skip
        await self.store.register("engine", engine.name, details, 60)

    def openai(self, key: str = KEY) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def http(self, key: str = KEY) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=20, verify=self.verify
        )

    async def known(self) -> dict[str, dict[str, Any]]:
        async with self.http() as client:
            return {engine["name"]: engine for engine in (await client.get("/engines")).json()["engines"]}


async def until(condition: Callable[[], Any], deadline_s: float = 10.0) -> None:
    """Wait until `condition`, a function or coroutine function, holds."""
    end = time.monotonic() + deadline_s
    while True:
        held = condition()
        if asyncio.iscoroutine(held):
            held = await held
        if held:
            return
        assert time.monotonic() < end, f"the condition did not hold within {deadline_s} s"
        await asyncio.sleep(0.01)


def recipe(max_length: int = 256, chat_template: str | None = None, **router: Any) -> Recipe:
    return Recipe.model_validate({
        "name": RUN, "model": {"path": "/models/stub", "chat_template": chat_template},
        "data": {"kind": "file", "path": "rows.jsonl"},
        "reward": {"grader": "exact"}, "trainer": {"steps": 1}, "router": router,
        "rollout": {"engine": {"max_length": max_length}, "sampling": {"max_new_tokens": 64}},
    })  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path, valkey: Any) -> Environment:
    return Environment(
        run=RUN, folder=tmp_path, recipe=tmp_path / "recipe.yaml", nats_url="", redis_url=valkey.url, key=KEY,
        model=write_model(tmp_path / "model"), name="router-0",
    )  # fmt: skip


@pytest.fixture
async def start_router(environment: Environment) -> AsyncIterator[Callable[..., Any]]:
    """Starts routers with the given settings of the recipe's `router` section."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(verify: Any = True, **settings: Any) -> Mesh:
            name = f"router-{len(started)}"
            started.append(name)
            stop = asyncio.Event()
            service = RouterService(replace(environment, name=name), recipe(**settings))
            running = asyncio.create_task(service.run(stop))
            store = await Store.connect(environment.redis_url, RUN)
            mesh = Mesh("", store, service, client=None, verify=verify)  # type: ignore[arg-type]

            async def end() -> None:
                stop.set()
                await asyncio.gather(asyncio.wait_for(running, 15), return_exceptions=not mesh.url)
                for engine in mesh.engines.values():
                    await engine.stop()
                if mesh.client is not None:
                    await mesh.client.close()
                await store.close()

            stack.push_async_callback(end)

            async def registered() -> bool:
                if running.done():
                    running.result()
                return name in await store.members("router")

            await until(registered)
            mesh.url = (await store.members("router"))[name]["url"]
            mesh.client = mesh.openai()

            async def ready() -> bool:
                async with mesh.http() as client:
                    return (await client.get("/readyz")).status_code == 200

            await until(ready)
            return mesh

        started: list[str] = []
        yield start


@pytest.fixture
async def mesh(start_router: Callable[..., Any]) -> Mesh:
    return await start_router()


@pytest.fixture
def write_recipe() -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(recipe().model_dump(mode="json"))) and None


@pytest.fixture
def stub_engine() -> type[StubEngine]:
    return StubEngine


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., Any]:
    return until
