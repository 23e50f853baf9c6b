"""The worker on a real NATS and a real Valkey, against a stub router that can be told to fail."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from aiohttp import web

from postroad.bus import Bus
from postroad.config import Environment, Recipe
from postroad.messages import (
    DeadLetter,
    EngineFeatures,
    RewardSpec,
    Sampling,
    Task,
    Trajectory,
    VersionSpan,
    decode,
    encode,
)  # fmt: skip
from postroad.store import Store
from postroad_rollout.worker.service import WorkerService

RUN = "worker-test"
KEY = "mesh-key"
PROMPT = [5, 6, 7]


async def until(condition: Callable[[], Any], deadline_s: float = 15.0) -> None:
    end = time.monotonic() + deadline_s
    while True:
        held = condition()
        if asyncio.iscoroutine(held):
            held = await held
        if held:
            return
        assert time.monotonic() < end, f"the condition did not hold within {deadline_s} s"
        await asyncio.sleep(0.01)


@dataclass
class StubRouter:
    """Answers with tokens that depend on the seed, and what `says` makes of a request's body. `faults` are used up one per
    request; `held` seeds never answer. It has one more key per session."""

    faults: list[str] = field(default_factory=list)
    refuse: bool = False
    says: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"content": f"answer {body.get('seed')}"}
    keys: dict[str, str] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    requests: list[dict[str, Any]] = field(default_factory=list)
    sessions: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    url: str = ""

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/sessions/{session}/v1/chat/completions", self.chat)
        app.router.add_post("/sessions/{session}/trajectories", self.collect)
        app.router.add_delete("/sessions/{session}", self.forget)
        app.router.add_post("/keys", self.create_key)
        app.router.add_delete("/keys/{name}", self.delete_key)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def chat(self, request: web.Request) -> web.Response:
        key = self.keys.get(request.match_info["session"])
        assert request.headers["Authorization"] in (f"Bearer {KEY}", f"Bearer {key}")
        body = await request.json()
        self.requests.append(body)
        if self.refuse:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "drop":
            request.transport.abort()  # type: ignore[union-attr]
        elif fault.isdigit():
            return web.json_response({"error": {}}, status=int(fault), headers={"Retry-After": "0"})
        if body.get("seed") in self.held:
            await asyncio.Event().wait()
        message = {"role": "assistant", **self.says(body)}
        self.sessions[request.match_info["session"]] = ({**body, "answer": message}, fault)
        return web.json_response({
            "choices": [{"message": message, "finish_reason": "stop"}] if fault != "empty" else [],
            "id": "c", "object": "chat.completion", "created": 1, "model": "postroad",
        })  # fmt: skip

    async def create_key(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.keys[body["session"]] = "key-" + body["session"]
        return web.json_response({"name": body["name"], "key": self.keys[body["session"]]})

    async def delete_key(self, request: web.Request) -> web.Response:
        del self.keys[request.match_info["name"]]
        return web.json_response({"withdrawn": 1})

    async def collect(self, request: web.Request) -> web.Response:
        asked = msgpack.unpackb(await request.read())
        task = decode(asked["task"])
        assert isinstance(task, Task) and asked["keep"] == "latest"
        body, fault = self.sessions[request.match_info["session"]]
        self.sessions[request.match_info["session"]] = (body, "")
        if fault == "lost":
            return web.json_response({"error": {"message": "no session"}}, status=404)
        if fault == "short":
            return web.Response(body=b"\x91")
        seed = body.get("seed", 0)
        spans = [(3, 7, 1)] if fault == "old" else [(3, 4, 3), (4, 7, 4)]
        trajectory = Trajectory(
            run=RUN, id="any", member=asked["member"], task=task, engine="engine-0", finish_reason="stop",
            tokens=np.array([*PROMPT, seed % 50, 11, 12, 2], np.int32),
            loss_mask=np.array([0, 0, 0, 1, 1, 1, 1], np.uint8),
            log_probabilities=np.array([0, 0, 0, -0.5, -0.25, -0.125, -1.0], np.float32),
            versions=[VersionSpan(start=s, end=e, version=v, digest=f"d{v}") for s, e, v in spans],
            messages=[*body["messages"], body["answer"]],
            routed_experts=np.zeros((6, 2, 2), np.uint8) if body.get("routed_experts") else None,
        )  # fmt: skip
        return web.Response(body=msgpack.packb([encode(trajectory)]))

    async def forget(self, request: web.Request) -> web.Response:
        del self.sessions[request.match_info["session"]]
        return web.Response(status=204)


@dataclass
class Road:
    bus: Bus
    store: Store
    router: StubRouter
    environment: Environment
    workers: list[asyncio.Task[None]] = field(default_factory=list)
    stops: list[asyncio.Event] = field(default_factory=list)

    def start_worker(self, **rollout: Any) -> WorkerService:
        name = f"worker-{len(self.workers)}"
        service = WorkerService(replace(self.environment, name=name), recipe(**rollout), ack_wait_s=1.0)
        self.stops.append(asyncio.Event())
        self.workers.append(asyncio.create_task(service.run(self.stops[-1])))
        return service

    async def stop_workers(self) -> None:
        for stop in self.stops:
            stop.set()
        await asyncio.wait_for(asyncio.gather(*self.workers, return_exceptions=True), 10)

    async def register_router(self) -> None:
        await self.store.register("router", "router-0", {"url": self.router.url, "pid": 1}, 60)

    async def issue(self, group: str = "g1", **fields: Any) -> Task:
        task = make_task(group, **fields)
        await self.bus.publish(self.bus.subjects.task(group), task)
        return task

    async def published(self, group: str = "g1") -> dict[int, Trajectory]:
        found = {}
        for member in range(8):
            logged = await self.bus.last("TRAJECTORIES", self.bus.subjects.trajectory(group, member))
            if logged is not None:
                assert isinstance(logged.message, Trajectory)
                found[member] = logged.message
        return found

    async def dead(self) -> DeadLetter | None:
        logged = await self.bus.last("DEAD", self.bus.subjects.dead("task"))
        return logged.message if logged else None  # type: ignore[return-value]

    async def tasks_left(self) -> int:
        return int((await self.bus.jetstream.stream_info("TASKS")).state.messages)

    async def finished(self) -> bool:
        return await self.tasks_left() == 0


def make_task(group: str = "g1", **fields: Any) -> Task:
    return Task(**{
        "run": RUN, "id": group, "prompt": [{"role": "user", "content": "2+2"}], "members": 4, "row": "r1",
        "sampling": Sampling(max_new_tokens=8, seed=100, temperature=0.5, stop=("END",)),
        "reward": RewardSpec(grader="exact"), "deadline": time.time() + 60, "minimum_version": 3, **fields,
    })  # fmt: skip


def recipe(**rollout: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"bundled": "tiny-llama"}, "data": {"kind": "file", "path": "rows.jsonl"},
        "reward": {"grader": "exact"}, "trainer": {"steps": 1}, "rollout": rollout,
    })  # fmt: skip


@pytest.fixture
async def road(tmp_path: Path, nats: Any, valkey: Any) -> AsyncIterator[Road]:
    environment = Environment(
        run=RUN, folder=tmp_path, recipe=tmp_path / "recipe.yaml", nats_url=nats.url, redis_url=valkey.url, key=KEY
    )
    router = StubRouter()
    await router.start()
    bus, store = await Bus.connect(nats.url, RUN), await Store.connect(valkey.url, RUN)
    await bus.create_streams()
    road = Road(bus, store, router, environment)
    try:
        yield road
    finally:
        await road.stop_workers()
        await store.close()
        await bus.close()
        await router.runner.cleanup()


async def test_a_group_is_published_exactly(road: Road) -> None:
    await road.register_router()
    road.start_worker()
    await road.issue(features=EngineFeatures(routed_experts=True))
    await until(road.finished)
    published = await road.published()
    assert sorted(published) == [0, 1, 2, 3]
    assert sorted(body["seed"] for body in road.router.requests) == [100, 101, 102, 103]
    request = road.router.requests[0]
    assert request["minimum_version"] == 3 and request["temperature"] == 0.5 and request["stop"] == ["END"]
    assert request["max_tokens"] == 8 and 50 < request["timeout_s"] <= 60
    trajectory = published[2]
    assert trajectory.id == "g1.2" and trajectory.engine == "engine-0" and trajectory.finish_reason == "stop"
    assert trajectory.tokens.tolist() == [*PROMPT, 102 % 50, 11, 12, 2]
    assert trajectory.loss_mask.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert trajectory.log_probabilities.tolist() == [0, 0, 0, -0.5, -0.25, -0.125, -1.0]
    assert [(s.start, s.end, s.version, s.digest) for s in trajectory.versions] == [(3, 4, 3, "d3"), (4, 7, 4, "d4")]
    assert trajectory.routed_experts is not None and trajectory.routed_experts.shape == (6, 2, 2)
    assert not road.router.sessions, "what is published is forgotten"
    assert trajectory.messages[-1] == {"role": "assistant", "content": "answer 102"} and trajectory.response


async def test_a_worker_that_dies_leaves_its_finished_members(road: Road) -> None:
    """The first worker publishes two members and is lost; the next one makes the other two alone."""
    await road.register_router()
    road.router.held = {101, 103}
    road.start_worker()
    await road.issue()

    async def half() -> bool:
        return len(await road.published()) == 2

    await until(half)
    first = await road.published()
    road.workers[0].cancel()
    await asyncio.wait({road.workers[0]})
    road.router.held, road.router.requests = set(), []
    road.start_worker()
    await until(road.finished)
    assert sorted(body["seed"] for body in road.router.requests) == [101, 103]
    published = await road.published()
    assert sorted(published) == [0, 1, 2, 3]
    assert all(published[member].seconds == first[member].seconds for member in first)


async def test_a_member_that_another_worker_published_is_counted_not_doubled(road: Road) -> None:
    await road.register_router()
    road.router.held = {100}
    road.start_worker()
    task = await road.issue(members=1)
    await until(lambda: road.router.requests)
    other = Trajectory(
        run=RUN, id="g1.0", member=0, task=task, tokens=np.array([1, 2], np.int32), versions=[],
        loss_mask=np.zeros(2, np.uint8), log_probabilities=np.zeros(2, np.float32), messages=[], finish_reason="stop",
    )  # fmt: skip
    await road.bus.publish(road.bus.subjects.trajectory("g1", 0), other, once=True)
    await road.router.runner.cleanup()
    road.router.held = set()
    await road.router.start()
    await road.register_router()
    await until(road.finished)
    assert (await road.published())[0].tokens.tolist() == [1, 2] and await road.dead() is None


async def test_the_deadline_sends_the_task_to_dead_and_keeps_what_is_done(road: Road) -> None:
    await road.register_router()
    road.router.held = {101}
    road.start_worker()
    await road.issue(deadline=time.time() + 1.0)
    await until(road.finished)
    dead = await road.dead()
    assert dead is not None and dead.reason == "deadline" and dead.group == "g1" and dead.stage == "task"
    assert sorted(await road.published()) == [0, 2, 3]


async def test_a_task_whose_deadline_has_passed_is_not_begun(road: Road) -> None:
    await road.register_router()
    road.start_worker()
    await road.issue(deadline=time.time() - 5)
    await until(road.finished)
    dead = await road.dead()
    assert dead is not None and dead.reason == "deadline" and not await road.published()


async def test_a_prompt_that_is_refused_goes_to_dead(road: Road) -> None:
    await road.register_router()
    road.router.refuse = True
    road.start_worker()
    await road.issue()
    await until(road.finished)
    dead = await road.dead()
    assert dead is not None and dead.reason == "refused_by_engine" and "too long" in dead.error
    assert len(road.router.requests) == 4


@pytest.mark.parametrize("fault", ["drop", "429", "500", "503", "short", "old", "empty"])
async def test_failures_of_the_router_are_asked_again(road: Road, fault: str) -> None:
    await road.register_router()
    road.router.faults = [fault, fault]
    road.start_worker()
    await road.issue(members=2)
    await until(road.finished)
    published = await road.published()
    asked = 2 if fault == "short" else 4  # a turn that is recorded is not generated again, if it is not too old
    assert sorted(published) == [0, 1] and len(road.router.requests) == asked and await road.dead() is None
    again = sum(trajectory.metrics["retries"] for trajectory in published.values())
    assert again == (0 if fault == "old" else 2)


async def test_a_session_that_is_lost_is_begun_anew(road: Road) -> None:
    await road.register_router()
    road.router.faults = ["lost"]
    road.start_worker()
    await road.issue(members=1)
    await until(road.finished)
    assert sorted(await road.published()) == [0] and len(road.router.requests) == 2 and await road.dead() is None


async def test_a_router_that_comes_later_and_moves(road: Road) -> None:
    service = road.start_worker()
    await road.issue()
    await until(lambda: service.runner is not None and service.runner.groups)
    await road.register_router()
    await until(road.finished)
    assert len(await road.published()) == 4
    await road.router.runner.cleanup()
    await road.issue("g2")
    await road.router.start()
    await road.register_router()
    await until(road.finished)
    assert len(await road.published("g2")) == 4


@pytest.mark.parametrize(
    "agent", [{"kind": "nothing"}, {"kind": "no.such.Agent"}, {"kind": "single_turn", "turns": 3}, {}]
)
async def test_an_agent_that_does_not_exist(road: Road, agent: dict[str, Any]) -> None:
    await road.register_router()
    road.start_worker()
    await road.issue(agent=agent)
    await until(road.finished)
    dead = await road.dead()
    assert dead is not None and dead.reason == "invalid_message" and "agent" in dead.error


async def test_a_users_agent_by_its_dotted_path(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_agents.py").write_text(
        "from postroad_rollout.worker.agents import SingleTurn\n"
        "class Polite(SingleTurn):\n"
        "    def __init__(self, word):\n        self.word = word\n"
        "    async def run(self, task, model):\n"
        "        if self.word == 'fail':\n            raise KeyError('broken agent')\n"
        "        prompt = [{'role': 'system', 'content': self.word}, *task.prompt]\n"
        "        return await super().run(task.model_copy(update={'prompt': prompt}), model)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    await road.register_router()
    road.start_worker(deliveries=2)
    await road.issue(agent={"kind": "my_agents.Polite", "word": "please"})
    await until(road.finished)
    assert road.router.requests[0]["messages"][0] == {"role": "system", "content": "please"}
    await road.issue("g2", agent={"kind": "my_agents.Polite", "word": "fail"})
    await until(road.finished)
    dead = await road.dead()
    assert dead is not None and dead.reason == "invalid_answer" and "broken agent" in dead.error


async def test_stopping_lets_go_within_five_seconds(road: Road) -> None:
    await road.register_router()
    road.router.held = {100, 101, 102, 103}
    service = road.start_worker()
    await road.issue()
    await until(lambda: len(road.router.requests) == 4)

    async def registered() -> bool:
        return (await road.store.members("worker")).get("worker-0", {}).get("groups") == 1

    await until(registered)
    road.stops[0].set()
    started = time.monotonic()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(road.workers[0], 6)
    assert time.monotonic() - started < 5 and service.state == "stop"
    assert await road.tasks_left() == 1 and "worker-0" not in await road.store.members("worker")
