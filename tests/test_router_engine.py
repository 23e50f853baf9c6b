"""Router, worker and real engines as processes: what is killed mid-generation goes on elsewhere, to the same tokens."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import openai
import pytest

from postroad.bus import Bus
from postroad.messages import EngineFeatures, RewardSpec, Sampling, Task, Trajectory, decode, encode
from postroad.store import Store

RUN = "generation"
KEY = "mesh-key"
RECIPE = """
model: {bundled: tiny-qwen3-moe, dtype: float32}
data: {kind: file, path: rows.jsonl}
reward: {grader: exact}
trainer: {steps: 1}
rollout: {engine: {max_length: 512}}
"""


async def until(condition: Callable[[], Any], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while True:
        held = condition()
        if asyncio.iscoroutine(held):
            held = await held
        if held:
            return
        assert time.monotonic() < end, f"the condition did not hold within {deadline_s} s"
        await asyncio.sleep(0.02)


@dataclass
class Processes:
    folder: Path
    environment: dict[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, **self.environment, "POSTROAD_NAME": name, "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], env=environment, stdout=log, stderr=log
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def terminate(self, name: str) -> int:
        process = self.running.pop(name)
        process.terminate()
        return process.wait(10)

    def end(self) -> None:
        for name in list(self.running):
            self.kill(name)


@pytest.fixture
def processes(tmp_path: Path, nats: Any, valkey: Any) -> Any:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    processes = Processes(tmp_path, {
        "POSTROAD_RUN": RUN, "POSTROAD_DIR": str(tmp_path), "POSTROAD_RECIPE": str(tmp_path / "recipe.yaml"),
        "POSTROAD_MODEL": str(tmp_path / "model"), "POSTROAD_NATS_URL": nats.url, "POSTROAD_REDIS_URL": valkey.url,
        "POSTROAD_KEY": KEY,
    })  # fmt: skip
    processes.start("model", "postroad_trainer.models.tiny", "--out", str(tmp_path / "model"), "--kind", "qwen3_moe")
    assert processes.running.pop("model").wait(60) == 0, processes.log("model")
    yield processes
    processes.end()


@pytest.fixture
async def store(valkey: Any, processes: Processes, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """With engines of the roles that the test's mark names (two mixed ones without it), that a task keeps registered
    while their processes live."""
    store = await Store.connect(valkey.url, RUN)
    mark = request.node.get_closest_marker("roles")
    roles = {f"engine-{number}": role for number, role in enumerate(mark.args if mark else ("mixed", "mixed"))}
    urls: dict[str, str] = {}
    for name, role in roles.items():
        processes.start(
            name, "postroad_rollout.engine.server", "--model", str(processes.folder / "model"), "--port", "0",
            "--dtype", "float32", "--slots", "8", "--max-length", "512", "--role", role,
        )  # fmt: skip
    for name in roles:
        await until(lambda name=name: "engine: http" in processes.log(name))
        urls[name] = processes.log(name).partition("engine: ")[2].split()[0]

    async def register() -> None:
        while not ending.done():
            for name in urls.keys() & processes.running.keys():
                port = processes.log(name).partition("bootstrap: ")[2].split()[:1]
                info = {"url": urls[name], "pid": processes.running[name].pid, "version": 0, "digest": "", "state": "ready",
                        "slots": 8, "running": 0, "role": roles[name], "bootstrap_port": int(*port)}  # fmt: skip
                await store.register("engine", name, info, 6)
            await asyncio.wait({ending}, timeout=1)

    ending = asyncio.get_running_loop().create_future()
    registering = asyncio.create_task(register())
    yield store
    ending.set_result(None)
    await registering
    await store.close()


@pytest.fixture
async def client(processes: Processes, store: Store) -> AsyncIterator[openai.AsyncOpenAI]:
    processes.start("router-0", "postroad_router")

    async def registered() -> bool:
        assert processes.running["router-0"].poll() is None, processes.log("router-0")
        return bool(await store.members("router"))

    await until(registered)
    url = (await store.members("router"))["router-0"]["url"]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
    yield client
    await client.close()


EXTRA = {"return_token_ids": True, "routed_experts": True, "ignore_eos": True}


async def stream(client: openai.AsyncOpenAI, after: int = 0, then: Callable[[], None] = lambda: None) -> Any:
    """The last chunk's choice, and the whole text; `then` is called after so many chunks."""
    answer = await client.chat.completions.create(
        model="postroad", messages=[{"role": "user", "content": "go on"}], max_tokens=300, seed=5, stream=True,
        extra_body=EXTRA,
    )  # fmt: skip
    text, number, choice = "", 0, None
    async for chunk in answer:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        number += 1
        if number == after:
            then()
    return choice, text


async def test_an_engine_killed_in_mid_stream(processes: Processes, client: openai.AsyncOpenAI, store: Store) -> None:
    whole, text = await stream(client)
    assert len(whole.token_ids) == 300 and whole.versions == [[0, 300, 0]]
    rows = len(whole.prompt_token_ids) + 299
    assert whole.routed_experts["shape"] == [rows, 2, 2] and whole.routed_experts["dtype"] == "u1"
    first = whole.engine

    resumed, again = await stream(client, 40, lambda: processes.kill(first))
    assert resumed.engine != first, "the stream was over before the engine was killed"
    assert again == text and resumed.token_ids == whole.token_ids
    assert resumed.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-3)
    assert resumed.routed_experts["data"] == whole.routed_experts["data"] and not resumed.routed_experts["unmatched"]


@pytest.mark.roles("prefill", "decode", "prefill", "mixed")
async def test_a_pair_is_one_engine_to_the_client(
    processes: Processes, client: openai.AsyncOpenAI, store: Store
) -> None:
    """A pair, another pair, a mixed engine that goes on for a pair, and one alone: the same tokens and experts."""
    whole, text = await stream(client)
    assert whole.engine == "engine-1", "the decode engine"
    processes.kill("engine-0")
    other, same = await stream(client)
    assert other.engine == "engine-1" and same == text
    resumed, again = await stream(client, 40, lambda: processes.kill("engine-1"))
    assert resumed.engine == "engine-3" and again == text and not resumed.routed_experts["unmatched"]
    alone, once_more = await stream(client)
    assert alone.engine == "engine-3" and once_more == text
    assert len({one.routed_experts["data"] for one in (whole, other, resumed, alone)}) == 1
    assert whole.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-3)


async def test_a_worker_killed_in_mid_group(
    processes: Processes, client: openai.AsyncOpenAI, store: Store, nats: Any
) -> None:
    bus = await Bus.connect(nats.url, RUN)
    await bus.create_streams()
    task = Task(
        run=RUN, id="g0", prompt=[{"role": "user", "content": "count"}], members=6, row="r", minimum_version=0,
        sampling=Sampling(max_new_tokens=400, seed=9), reward=RewardSpec(grader="exact"),
        features=EngineFeatures(routed_experts=True), deadline=time.time() + 120,
    )  # fmt: skip

    async def members() -> dict[str, int]:
        return await bus.subjects_of("TRAJECTORIES", "trajectory.generation.g0.*")

    async def done() -> bool:
        return (await bus.jetstream.stream_info("TASKS")).state.messages == 0

    processes.start("worker-0", "postroad_rollout.worker")
    await bus.publish(bus.subjects.task("g0"), task)

    async def some() -> bool:
        assert processes.running["worker-0"].poll() is None, processes.log("worker-0")
        return bool(await members())

    await until(some)
    processes.kill("worker-0")
    assert len(await members()) < 6, "the group was over before the worker was killed"
    processes.start("worker-1", "postroad_rollout.worker")
    await until(done)
    assert set((await members()).values()) == {1} and len(await members()) == 6
    assert (await bus.subjects_of("DEAD", "dead.>")) == {}
    for member in range(6):
        logged = await bus.last("TRAJECTORIES", bus.subjects.trajectory("g0", member))
        assert logged is not None and isinstance(logged.message, Trajectory)
        assert logged.message.routed_experts is not None and logged.message.oldest_version == 0
    assert processes.terminate("worker-1") == 0 and processes.terminate("router-0") == 0
    await bus.close()


SHORT = "{% for m in messages %}{{ m.role[0] + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


async def test_a_session_of_fifty_turns_outlives_an_engine_and_a_router(processes: Processes, store: Store) -> None:
    """Turns go to two replicas in turn; then an engine dies, then a replica. Not a token is lost, doubled or drifts."""
    (processes.folder / "recipe.yaml").write_text(RECIPE.replace("model: {", f'model: {{chat_template: "{SHORT}", '))
    for name in ("router-0", "router-1"):
        processes.start(name, "postroad_router")

    async def both() -> bool:
        return len(await store.members("router")) == 2

    await until(both)
    urls = [info["url"] for _, info in sorted((await store.members("router")).items())]
    agents = [openai.AsyncOpenAI(base_url=f"{url}/sessions/long/v1", api_key=KEY, timeout=60) for url in urls]
    messages: list[Any] = []
    before: list[int] = []
    for turn in range(50):
        if turn == 20:
            processes.kill("engine-0")
        if turn == 35:
            processes.kill("router-0")
        messages.append({"role": "user", "content": f"{turn % 10}"})
        answer = await agents[1 if turn >= 35 else turn % 2].chat.completions.create(
            model="postroad", messages=messages, max_tokens=3, temperature=0,
            extra_body={"return_token_ids": True, "routed_experts": True, "stop_token_ids": [2]},
        )  # fmt: skip
        choice = answer.choices[0]
        assert choice.prompt_token_ids[: len(before)] == before, turn
        before = choice.prompt_token_ids + choice.token_ids
        messages.append({"role": "assistant", "content": choice.message.content})
    task = Task(
        run=RUN, id="g0", prompt=messages[:1], members=1, row="r", sampling=Sampling(), deadline=time.time() + 60,
        reward=RewardSpec(grader="exact"), features=EngineFeatures(routed_experts=True),
    )  # fmt: skip
    async with httpx.AsyncClient(base_url=urls[1], headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        body = msgpack.packb({"task": encode(task), "member": 0})
        found = (await client.post("/sessions/long/trajectories", content=body)).content
        (trajectory,) = [decode(each) for each in msgpack.unpackb(found)]
        whole = await client.post("/v1/completions", json={
            "model": "postroad", "prompt": before, "max_tokens": 1, "return_token_ids": True, "routed_experts": True,
        })  # fmt: skip
    assert isinstance(trajectory, Trajectory) and trajectory.tokens.tolist() == before
    assert trajectory.metrics["turns"] == 50 and 50 <= trajectory.loss_mask.sum() <= 150
    assert {kind: count for kind, count in trajectory.metrics.items() if kind.startswith("drift") and count} == {}
    told = whole.json()["choices"][0]["routed_experts"]
    rows = np.frombuffer(base64.b64decode(told["data"]), np.uint8).reshape(told["shape"])
    assert trajectory.routed_experts is not None and (trajectory.routed_experts == rows[: len(before) - 1]).all()
    for agent in agents:
        await agent.close()
