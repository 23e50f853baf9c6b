"""Requests that come again: after an answer, beside one that runs, and after the death of the router that had them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from postroad.store import Store

MESSAGES = [{"role": "user", "content": "hello"}]


async def post(client: httpx.AsyncClient, key: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    body = {"model": "stub", "messages": MESSAGES, "max_tokens": 6, **body}
    return await client.post(path, json=body, headers={"Idempotency-Key": key})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_retry_gets_the_stored_answer_from_any_router(
    start_router: Any, stub_engine: Any, stream: bool
) -> None:
    one, other = await start_router(), await start_router()
    engine = await one.add(stub_engine("a"))
    async with one.http() as first, other.http() as second:
        answers = [await post(client, "k1", stream=stream) for client in (first, second, first)]
        assert {answer.content for answer in answers} == {answers[0].content} and len(engine.requests) == 1
        assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true", "true"]
        assert len({answer.headers["content-type"] for answer in answers}) == 1
        other_request = await post(first, "k1", stream=stream, max_tokens=7)
        assert other_request.status_code == 409 and other_request.json()["error"]["code"] == "idempotency_key_reused"
        await post(first, "k2", stream=stream)
        assert len(engine.requests) == 2
        assert (await post(first, "k" * 256)).status_code == 400


async def test_two_at_a_time_are_generated_once(mesh: Any, stub_engine: Any, until: Any) -> None:
    engine = await mesh.add(stub_engine("a", hold=asyncio.Event()))
    async with mesh.http() as client:
        asking = [asyncio.create_task(post(client, "k")) for _ in range(3)]
        await until(lambda: engine.requests)
        engine.hold.set()
        answers = [(await one).json() for one in asking]
    assert answers[0] == answers[1] == answers[2] and len(engine.requests) == 1


async def test_a_failure_is_not_kept(mesh: Any, stub_engine: Any, until: Any) -> None:
    engine = await mesh.add(stub_engine("a", status=503))
    async with mesh.http() as client:
        assert (await post(client, "k", timeout_s=0.3)).status_code in (503, 504)
        engine.status = None
        assert (await post(client, "k", timeout_s=0.3)).status_code == 200
        refused = await post(client, "r", temperature=-1)
        assert refused.status_code == 400
        assert (await post(client, "r", temperature=-1)).headers["idempotency-replayed"] == "true"


async def test_a_recorded_turn_is_answered_again_where_the_answer_was_lost(mesh: Any, stub_engine: Any) -> None:
    """As if the router had died between the record of the turn and the answer."""
    engine = await mesh.add(stub_engine("a"))
    async with mesh.http() as client:
        client.headers["X-Postroad-Session"] = "s"
        first = (await post(client, "k", return_token_ids=True)).json()
        for name in await mesh.store.client.keys(mesh.store.key("idempotency", "*")):
            await mesh.store.client.delete(name)
        again = (await post(client, "k", return_token_ids=True)).json()
        tree = (await client.get("/sessions/s")).json()
    assert len(engine.requests) == 1 and len(tree["turns"]) == 1
    for one, other in zip(first["choices"], again["choices"], strict=True):
        assert one["token_ids"] == other["token_ids"] and one["message"] == other["message"]
        assert one["token_logprobs"] == pytest.approx(other["token_logprobs"])
        assert (one["versions"], one["finish_reason"]) == (other["versions"], other["finish_reason"])


# ── replicas ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Replicas:
    """Router processes on one port, and their engine."""

    url: str
    settings: dict[str, str]
    log: Path
    store: Store
    engine: Any
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    async def start(self, until: Any) -> None:
        """One more, until it is registered."""
        count = len(self.processes) + 1
        with self.log.open("a") as output:
            self.processes.append(subprocess.Popen(
                [sys.executable, "-m", "postroad_router"], env={**self.settings, "POSTROAD_NAME": f"r{count}"},
                stderr=output, stdout=output,
            ))  # fmt: skip

        async def registered() -> bool:
            assert self.processes[-1].poll() is None, self.log.read_text()
            return len(await self.store.members("router")) == count

        await until(registered, 30)


@pytest.fixture
async def replicas(environment: Any, stub_engine: Any, write_recipe: Any) -> AsyncIterator[Replicas]:
    write_recipe(environment.recipe)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        **os.environ, "POSTROAD_RUN": environment.run, "POSTROAD_DIR": str(environment.folder),
        "POSTROAD_RECIPE": str(environment.recipe), "POSTROAD_MODEL": str(environment.model), "POSTROAD_NATS_URL": "none",
        "POSTROAD_REDIS_URL": environment.redis_url, "POSTROAD_KEY": environment.key, "POSTROAD_PORT": str(port),
    }  # fmt: skip
    store = await Store.connect(environment.redis_url, environment.run)
    engine = stub_engine("a", pause_s=0.02)
    await engine.start()
    details = {"url": engine.url, "pid": 1, "version": 1, "digest": "d", "state": "ready", "slots": 8, "running": 0}
    await store.register("engine", "a", details, 60)
    made = Replicas(f"http://127.0.0.1:{port}", settings, environment.folder / "routers.log", store, engine)
    try:
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait(10)
        await engine.stop()
        await store.close()


async def test_a_router_killed_in_mid_stream_costs_a_retry(replicas: Replicas, until: Any) -> None:
    await replicas.start(until)
    headers = {"Authorization": "Bearer mesh-key", "X-Postroad-Session": "s", "Idempotency-Key": "turn-1"}
    body = {"model": "stub", "messages": MESSAGES, "max_tokens": 40, "seed": 1, "stream": True}
    seen = ""
    async with httpx.AsyncClient(base_url=replicas.url, timeout=30, headers=headers) as client:
        await client.get("/livez")  # this connection is the first router's
        await replicas.start(until)
        with pytest.raises(httpx.TransportError):
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    seen += line
                    if seen.count("data:") == 5:
                        replicas.processes[0].kill()
        assert "[DONE]" not in seen
        replicas.processes[0].wait(10)  # its socket takes no more connections
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200 and answer.text.count("[DONE]") == 1
        assert "idempotency-replayed" not in answer.headers
        assert len((await client.get("/sessions/s")).json()["turns"]) == 1, "no turn is lost or doubled"
        again = await client.post("/v1/chat/completions", json=body)
        assert again.headers["idempotency-replayed"] == "true" and again.text == answer.text
        assert len((await client.get("/sessions/s")).json()["turns"]) == 1
    assert [process.poll() is None for process in replicas.processes] == [False, True]


async def test_replicas_share_the_work(replicas: Replicas, until: Any) -> None:
    """Both answer on the port, and either goes on with a session."""
    for _ in range(2):
        await replicas.start(until)
    headers = {"Authorization": "Bearer mesh-key", "X-Postroad-Session": "t"}
    messages: list[dict[str, Any]] = list(MESSAGES)
    for _ in range(6):
        async with httpx.AsyncClient(base_url=replicas.url, timeout=30, headers=headers) as client:  # a new connection
            asked = {"model": "stub", "messages": messages, "max_tokens": 3}
            answer = (await client.post("/v1/chat/completions", json=asked)).json()
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "and"}]
    async with httpx.AsyncClient(base_url=replicas.url, timeout=30, headers=headers) as client:
        tree = (await client.get("/sessions/t")).json()
    assert len(tree["turns"]) == 6 and len(tree["ends"]) == 1
