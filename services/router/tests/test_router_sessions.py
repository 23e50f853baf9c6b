"""Sessions over the official client: exact tokens turn by turn, branches, owners, collection."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import openai
import pytest

from postroad.messages import EngineFeatures, RewardSpec, Sampling, Task, Trajectory, decode, encode
from postroad_router.template import load_vocabulary

USER = {"role": "user", "content": "hello"}
CALL = '<tool_call>\n{"name": "look", "arguments": {"a": 1, "b": [2.0]}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def task(experts: bool = False) -> Task:
    return Task(
        run="router-test", id="g0", prompt=[USER], members=1, row="r", sampling=Sampling(), deadline=time.time() + 60,
        reward=RewardSpec(grader="exact"), features=EngineFeatures(routed_experts=experts),
    )  # fmt: skip


async def collect(mesh: Any, session: str, keep: str = "branches", experts: bool = False) -> list[Trajectory]:
    body = msgpack.packb({"task": encode(task(experts)), "member": 0, "keep": keep})
    async with mesh.http() as client:
        answer = await client.post(f"/sessions/{session}/trajectories", content=body)
        assert answer.status_code == 200, answer.text
    return [decode(each) for each in msgpack.unpackb(answer.content)]  # type: ignore[misc]


async def tree(mesh: Any, session: str) -> dict[str, Any]:
    async with mesh.http() as client:
        answer = await client.get(f"/sessions/{session}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


class Agent:
    """An agent that knows nothing but a base URL and a key."""

    def __init__(self, mesh: Any, session: str) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"{mesh.url}/sessions/{session}/v1", api_key="mesh-key", max_retries=0, timeout=20
        )

    async def say(self, messages: list[Any], **parameters: Any) -> Any:
        extra = parameters.pop("extra_body", {})
        answer = await self.client.chat.completions.create(
            model="stub", messages=messages, extra_body={"return_token_ids": True, **extra}, **parameters
        )
        return answer.choices[0]

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_fifty_turns_without_drift(start_router: Any, stub_engine: Any, stream: bool) -> None:
    mesh = await start_router(max_length=4096)
    await mesh.add(stub_engine("e0", says="fine", mark=3))
    messages: list[Any] = []
    before: list[int] = []
    async with Agent(mesh, "long") as agent:
        for turn in range(50):
            messages.append({"role": "user", "content": f"turn {turn}"})
            extra = {"routed_experts": True, "return_token_ids": True}
            if stream:
                answer = await agent.client.chat.completions.create(
                    model="stub", messages=messages, stream=True, extra_body=extra
                )
                choice = [chunk async for chunk in answer][-1].choices[0]
                messages.append({"role": "assistant", "content": "fine"})
            else:
                choice = await agent.say(messages, extra_body=extra)
                messages.append(choice.message)
            assert choice.prompt_token_ids[: len(before)] == before, "a turn's tokens begin the next turn's prompt"
            before = choice.prompt_token_ids + choice.token_ids
    (trajectory,) = await collect(mesh, "long", experts=True)
    assert trajectory.tokens.tolist() == before and trajectory.loss_mask.sum() == 50 * 5
    assert trajectory.routed_experts is not None and (trajectory.routed_experts == 3).all()
    assert {k: v for k, v in trajectory.metrics.items() if k.startswith("drift")} == dict.fromkeys(
        ("drift_special_token_count", "drift_special_token_type", "drift_assistant_text", "drift_non_assistant_text"),
        0.0,
    )
    asked = [request.get("routed_experts_start_len", 0) for request in mesh.engines["e0"].requests]
    assert asked[0] == 0 and all(later > earlier for earlier, later in itertools.pairwise(asked))
    positions = np.flatnonzero(trajectory.loss_mask)
    assert trajectory.log_probabilities[positions] == pytest.approx(-0.01 * positions - 1, abs=1e-4)


async def test_tool_turns_in_other_spellings_are_the_same_session(mesh: Any, stub_engine: Any) -> None:
    engine = await mesh.add(stub_engine("e0", says=CALL))
    async with Agent(mesh, "tools") as agent:
        first = await agent.say([USER], tools=TOOLS)
        call = first.message.tool_calls[0]
        engine.says = "done"
        spelled = {"id": call.id, "type": "function", "index": 0,
                   "function": {"name": "look", "arguments": json.dumps({"b": [2], "a": 1}, indent=1)}}  # fmt: skip
        result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "42"}]}
        user = {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
        for content in (None, "", []):
            assistant = {"role": "assistant", "content": content, "tool_calls": [spelled]}
            second = await agent.say([user, assistant, result], tools=TOOLS)
            assert second.prompt_token_ids[: len(first.prompt_token_ids + first.token_ids)] == (
                first.prompt_token_ids + first.token_ids
            )
        other = {**spelled, "function": {"name": "look", "arguments": '{"a": true, "b": [2]}'}}
        edited = await agent.say([user, {"role": "assistant", "tool_calls": [other]}, result], tools=TOOLS)
        assert edited.prompt_token_ids[: len(first.prompt_token_ids)] != first.prompt_token_ids[:-1]
    found = await tree(mesh, "tools")
    assert [turn["parent"] for turn in found["turns"]] == [None, 0, 0, 0, None]


async def test_edits_and_retries_become_branches(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="fine"))
    said = {"role": "assistant", "content": "fine"}
    async with Agent(mesh, "s") as agent:
        await agent.say([USER])  # 0
        await agent.say([USER, said, {"role": "user", "content": "a"}])  # 1
        await agent.say([USER, said, {"role": "user", "content": "b"}])  # 2: instead of 1
        await agent.say([USER, said, {"role": "user", "content": "b"}, said, USER])  # 3
        await agent.say([USER, {"role": "assistant", "content": "edited"}, USER])  # 4: of words it did not say
    found = await tree(mesh, "s")
    assert [turn["parent"] for turn in found["turns"]] == [None, 0, 0, 2, None] and found["ends"] == [4, 3, 1]
    everything = await collect(mesh, "s", "all")
    assert [int(t.loss_mask.sum()) for t in everything] == [5, 15, 5], "turn 0 is trained once"
    assert [t.id for t in everything] == ["g0.0", "g0.0.3", "g0.0.1"]
    assert everything[0].messages[1]["content"] == "edited"
    assert [t.id for t in await collect(mesh, "s", "branches")] == ["g0.0", "g0.0.3"], (
        "1 and what it began were tried again"
    )
    assert len(await collect(mesh, "s", "latest")) == 1
    async with Agent(mesh, "s") as agent:
        for content in ("another", "talk", "talk"):  # 5, 6, 7
            await agent.say([{"role": "user", "content": content}])
    assert [t.id for t in await collect(mesh, "s", "branches")] == ["g0.0", "g0.0.5", "g0.0.4", "g0.0.3"]


async def test_concurrent_calls_are_siblings_and_none_is_lost(start_router: Any, stub_engine: Any) -> None:
    one, two = await start_router(), await start_router()
    await one.add(stub_engine("e0", says="fine", pause_s=0.01))
    async with Agent(one, "many") as agent, Agent(two, "many") as other:
        await agent.say([USER])
        history = [USER, {"role": "assistant", "content": "fine"}]
        asks = [(agent if n % 2 else other).say([*history, {"role": "user", "content": str(n)}]) for n in range(20)]
        await asyncio.gather(*asks)
        again = await other.say([*history, {"role": "user", "content": "7"}, history[1], USER], n=3)
        assert again
    turns = (await tree(two, "many"))["turns"]
    assert len(turns) == 24 and [turn["parent"] for turn in turns[1:21]] == [0] * 20
    assert len({turn["parent"] for turn in turns[21:]}) == 1
    assert len(await collect(two, "many")) == 22, "what runs at the same time is no second try"
    assert {turn["messages"][0]["content"] for turn in turns[1:21]} == {str(n) for n in range(20)}


async def test_a_turn_cut_short_is_closed_before_the_next(mesh: Any, stub_engine: Any) -> None:
    engine = await mesh.add(stub_engine("e0", says="a long answer"))
    async with Agent(mesh, "cut") as agent:
        first = await agent.say([USER], max_tokens=6)
        assert first.finish_reason == "length" and first.message.content == "a long"
        engine.says = "more"
        second = await agent.say([USER, first.message, {"role": "user", "content": "go on"}])
    added = second.prompt_token_ids[len(first.prompt_token_ids) + 6 :]
    text = load_vocabulary(mesh.service.environment.model).decode(added, special=True)
    assert text == "<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    (trajectory,) = await collect(mesh, "cut")
    assert trajectory.metrics["drift_special_token_count"] == 0 and trajectory.loss_mask.sum() == 11


async def test_reasoning_may_be_left_out_but_not_changed(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="<think>why</think>ok"))
    async with Agent(mesh, "r") as agent:
        first = await agent.say([USER])
        assert (first.message.reasoning_content, first.message.content) == ("why", "ok")
        for more in ({}, {"reasoning_content": "why "}, {"reasoning_content": "because"}):
            await agent.say([USER, {"role": "assistant", "content": "ok", **more}, USER])
    assert [turn["parent"] for turn in (await tree(mesh, "r"))["turns"]] == [None, 0, 0, None]


@pytest.mark.parametrize("family", ["default", "qwen3"])
async def test_where_the_template_drops_thoughts_a_branch_begins(
    start_router: Any, stub_engine: Any, family: str
) -> None:
    """Stock Qwen3 (family default) forgets thoughts at the next question; with the family's variables it keeps them."""
    template = (Path(__file__).parent / "templates" / "qwen3.jinja").read_text()
    mesh = await start_router(chat_template=template, max_length=2048, family=family)
    engine = await mesh.add(stub_engine("e0", says="<think>\nwhy\n</think>\n\n" + CALL))
    messages: list[Any] = [USER]
    async with Agent(mesh, "t") as agent:
        for says in ("<think>\nwell\n</think>\n\nok", "<think>\nthen\n</think>\n\nyes"):
            choice = await agent.say(messages, tools=TOOLS)
            messages.append(choice.message)
            calls = choice.message.tool_calls or []
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "42"} for call in calls] or [USER]
            engine.says = says
        await agent.say(messages, tools=TOOLS)
    turns = (await tree(mesh, "t"))["turns"]
    assert [turn["follows"] for turn in turns] == [None, 0, 1]
    assert [turn["parent"] for turn in turns] == ([None, 0, None] if family == "default" else [None, 0, 1])
    trajectories = await collect(mesh, "t")
    assert len(trajectories) == (2 if family == "default" else 1)
    generated = sum(turn["completion_tokens"] for turn in turns)
    assert sum(int(t.loss_mask.sum()) for t in trajectories) == generated, "each word is trained once"
    assert not any(v for t in trajectories for k, v in t.metrics.items() if k.startswith("drift"))


async def test_sessions_are_named_by_key_header_or_url(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="fine"))
    body = {"model": "stub", "messages": [USER]}
    async with mesh.http("mesh-key:by-key") as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        mixed = await client.post("/sessions/other/v1/chat/completions", json=body)
        assert mixed.status_code == 400 and mixed.json()["error"]["code"] == "two_sessions"
    async with mesh.http() as client:
        headers = {"X-Postroad-Session": "by-header"}
        assert (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
        bad = await client.post("/v1/chat/completions", json=body, headers={"X-Postroad-Session": "a b"})
        assert bad.status_code == 400 and bad.json()["error"]["code"] == "invalid_session"
        made = (await client.post("/sessions", json={"version": 1})).json()
        assert made["base_url"].endswith(f"/sessions/{made['session_id']}/v1")
        assert (await client.post(made["base_url"] + "/chat/completions", json=body)).status_code == 200
        assert (await tree(mesh, made["session_id"]))["version"] == 1
        taken = await client.post("/sessions", json={"session": made["session_id"]})
        assert taken.status_code == 409 and taken.json()["error"]["code"] == "session_exists"
        for name in ("by-key", "by-header"):
            assert len((await tree(mesh, name))["turns"]) == 1
            assert (await client.delete(f"/sessions/{name}")).status_code == 204
            gone = await client.get(f"/sessions/{name}")
            assert gone.status_code == 404 and gone.json()["error"]["code"] == "session_not_found"


async def test_keys_and_scopes(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="fine"))
    body = {"model": "stub", "messages": [USER]}

    async def key(**fields: Any) -> httpx.AsyncClient:
        async with mesh.http() as admin:
            made = await admin.post("/keys", json={"scope": "agent", **fields})
        return mesh.http(made.json()["key"])  # type: ignore[no-any-return]

    async with await key(name="a") as a, await key(name="b") as b, await key(name="c", session="only") as c:
        async with await key(name="w", scope="worker") as worker:
            assert (await a.post("/sessions/mine/v1/chat/completions", json=body)).status_code == 200
            foreign = await b.post("/sessions/mine/v1/chat/completions", json=body)
            assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "foreign_session"
            assert (await b.get("/sessions/mine")).status_code == 403
            assert (await worker.get("/sessions/mine")).status_code == 200
            assert (await c.post("/v1/chat/completions", json=body)).status_code == 200
            assert len((await tree(mesh, "only"))["turns"]) == 1
            assert (await c.post("/sessions/mine/v1/chat/completions", json=body)).status_code == 403
            for client, path, status in (
                (a, "/generate", 403), (a, "/sessions/mine/trajectories", 403), (a, "/keys", 403), (worker, "/keys", 403),
                (worker, "/sessions/mine/trajectories", 400),
            ):  # fmt: skip
                refused = await client.post(path, json={})
                assert refused.status_code == status, (path, refused.text)
            assert (await a.get("/engines")).status_code == 403
        async with mesh.http() as admin:
            assert (await admin.delete("/keys/a")).json() == {"withdrawn": 1}
        assert (await a.get("/v1/models")).status_code == 401
    stored = await mesh.store.client.hgetall(mesh.store.key("keys"))
    assert len(stored) == 3 and not any("sk-postroad" in field + value for field, value in stored.items())


async def test_a_session_that_is_full(start_router: Any, stub_engine: Any) -> None:
    mesh = await start_router(session_bytes=65536)
    await mesh.add(stub_engine("e0", says="fine"))
    async with Agent(mesh, "big") as agent:
        large = [{"role": "user", "content": "hello", "name": "x" * 40_000}]
        await agent.say(large)
        for _ in range(2):
            with pytest.raises(openai.ConflictError) as caught:
                await agent.say(large)
            assert caught.value.code == "session_full"
    assert len((await tree(mesh, "big"))["turns"]) == 1
    assert await mesh.store.client.pttl(mesh.store.key("session", "{big}", "turns")) > 0
