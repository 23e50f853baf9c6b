"""Agents on a real road, with a stub router that says what it is told to and tools that are functions of the test."""
# ruff: noqa: F811  the fixture road is imported

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_worker import RUN, Road, recipe, road, until  # noqa: F401

from postroad.bus import replies
from postroad.config import Recipe
from postroad.messages import Message, Sampling, ToolCall, ToolList, ToolResult
from postroad_rollout.worker.agents import make_agent
from postroad_rollout.worker.errors import AgentSettingsError

SCHEMA = {"type": "function", "function": {"name": "python", "description": "", "parameters": {}}}


@contextlib.asynccontextmanager
async def tools(road: Road, answer: Callable[[ToolCall], tuple[str, str]], holder: str = "") -> Any:
    """Serves `answer`'s status and content; the calls, in order, as a list."""
    calls: list[ToolCall] = []

    async def handle(message: Message) -> Message:
        assert isinstance(message, ToolCall)
        calls.append(message)
        if not message.tool:
            return ToolList(run=RUN, id="l", tools=[SCHEMA], deadlines_s={"python": 5})
        status, content = answer(message)
        return ToolResult(run=RUN, id="r", status=status, content=content, holder=holder)  # type: ignore[arg-type]

    subjects = {road.bus.subjects.tool(): "tools"} | ({road.bus.subjects.tool(holder): ""} if holder else {})
    async with replies(road.bus, subjects, handle, 100):
        yield calls


async def run(road: Road, agent: dict[str, Any], **fields: Any) -> dict[int, Any]:
    await road.register_router()
    road.start_worker()
    await road.issue(agent=agent, sampling=Sampling(max_new_tokens=8, seed=100), **fields)
    await until(road.finished)
    return await road.published()


def last(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def turns(body: dict[str, Any]) -> int:
    return sum(message["role"] == "assistant" for message in body["messages"])


async def test_tool_loop(road: Road) -> None:
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "python", "arguments": f'{{"code": "{n}"}}'}}
        for n in (1, 2)
    ]
    road.router.says = lambda body: {"content": "done"} if turns(body) == 2 else {"content": "", "tool_calls": calls}

    def answer(call: ToolCall) -> tuple[str, str]:
        return ("error", "no 2") if "2" in str(call.arguments) else ("ok", "one")

    async with tools(road, answer, "h") as called:
        published = await run(road, {"kind": "tool_loop"}, members=2)
        await until(lambda: sum(not call.tool and call.holder == "" for call in called) == 4)  # listed, and ended
    assert len(published) == 2 and published[0].response == "done"
    assert published[0].metrics.items() >= {"turns": 3, "tool_calls": 4, "tool_failures": 2}.items()
    assert [m["content"] for m in published[0].messages if m["role"] == "tool"] == ["one", "error: no 2"] * 2
    assert all(body["tools"] == [SCHEMA] for body in road.router.requests)
    sessions = {call.session for call in called if call.tool}
    assert len(sessions) == 2 and {call.holder for call in called if call.tool} == {"", "h"}


async def test_retool_and_search_r1(road: Road) -> None:
    road.router.says = lambda body: {"content": r"\boxed{42}" if turns(body) else "so <code>```python\nprint(42)\n```"}
    async with tools(road, lambda call: ("ok", "42")) as called:
        published = await run(road, {"kind": "retool"}, members=1)
        assert [call.arguments for call in called if call.tool] == [{"code": "print(42)"}]
        assert published[0].messages[-2] == {"role": "user", "content": "<interpreter>\n42\n</interpreter>"}
        assert road.router.requests[0]["stop"] == ["</code>"]
        said = ["I wonder", "<search>tea ", "<answer>green"]
        road.router.says = lambda body: {"content": said[turns(body)]}
        await road.issue("g2", agent={"kind": "search_r1", "tool": "python"}, members=1)
        await until(road.finished)
        assert called[-1].arguments == {"query": "tea"}
        await road.issue("g3", agent={"kind": "search_r1", "max_turns": 2, "tool": "python"}, members=1)
        await until(road.finished)
    found = (await road.published("g2"))[0].messages
    assert "neither a search nor an answer" in found[-4]["content"] and found[-2]["content"].startswith(
        "<information>\n42"
    )
    assert (await road.published("g3"))[0].metrics["turns"] == 2


async def test_a_lost_sandbox_is_a_retry_and_a_dead_letter_at_last(road: Road) -> None:
    """State that is lost begins the attempt anew; what has no state is called again."""
    road.router.says = lambda body: {"content": ("done" if turns(body) == 2 else "<code>1")}
    lost: list[str] = []

    def stateless(call: ToolCall) -> tuple[str, str]:
        lost.append(call.session)
        return ("sandbox_lost", "gone") if len(lost) == 1 else ("ok", "1")

    async with tools(road, stateless):
        published = await run(road, {"kind": "retool"}, members=1)
    assert len(set(lost)) == 1 and len(lost) == 3 and published[0].response == "done"

    def stateful(call: ToolCall) -> tuple[str, str]:
        lost.append(call.session)
        return ("sandbox_lost", "gone") if call.holder and len(lost) < 3 else ("ok", "1")

    lost.clear()
    async with tools(road, stateful, "h"):
        await road.issue("g2", agent={"kind": "retool"}, members=1)
        await until(road.finished)
    assert len(set(lost)) == 2 and len(lost) == 4 and (await road.published("g2"))[0].response == "done"
    assert await road.dead() is None


async def test_a_conversation_without_room_ends_where_it_is(road: Road) -> None:
    def says(body: dict[str, Any]) -> dict[str, Any]:
        road.router.refuse = True
        return {"content": "<code>1"}

    road.router.says = says
    async with tools(road, lambda call: ("ok", "1")):
        published = await run(road, {"kind": "retool"}, members=1)
    assert published[0].metrics["out_of_room"] == 1 and published[0].response == "<code>1"


async def test_a_team_goes_on_from_what_is_in_the_log(road: Road) -> None:
    def says(body: dict[str, Any]) -> dict[str, Any]:
        role = 2 if "Judgment" in last(body) else 1 if "better solution" in last(body) else 0
        return {"content": f"<think>hm</think> {['solved', 'rewritten', 'Judgment: 1'][role]} {body['seed']}"}

    road.router.says, road.router.held = says, {103}
    await road.register_router()
    road.start_worker()
    await road.issue(agent={"kind": "multi_agent"}, members=5)

    async def three() -> bool:
        return sorted(await road.published()) == [0, 1, 2]

    await until(three)
    road.workers[0].cancel()
    await until(road.workers[0].done)
    road.router.held, road.router.requests = set(), []
    road.start_worker()
    await until(road.finished)
    published = await road.published()
    assert [body["seed"] for body in road.router.requests] == [103, 104]
    assert "Solution 1:\nsolved 100\n\nSolution 2:\nsolved 101" in published[3].messages[-2]["content"]
    assert "Solution 1:\nrewritten 102\n\nSolution 2:\nrewritten 103" in published[4].messages[-2]["content"]
    assert published[4].response.endswith("Judgment: 1 104")
    await road.issue("g2", agent={"kind": "multi_agent"}, members=1)  # an evaluation
    await until(road.finished)
    assert "solved" in (await road.published("g2"))[0].response


async def test_black_boxes(road: Road, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("POSTROAD_KEY", "a secret")
    script = [sys.executable, str(Path(__file__).with_name("example_agents.py"))]
    for group, agent in (("g1", {"command": script}), ("g2", {"function": "example_agents.ask_once"})):
        await road.register_router()
        road.start_worker()
        await road.issue(group, agent={"kind": "black_box", **agent}, members=1)
        await until(road.finished)
        assert re.match("by a (program|function)", (await road.published(group))[0].messages[-2]["content"])
    assert not road.router.keys and not road.router.sessions
    await road.stop_workers()
    road.start_worker(deliveries=1)
    await road.issue("g3", agent={"kind": "black_box", "command": [*script, "fail"]}, members=1)
    await until(road.finished)
    dead = await road.dead()
    assert dead is not None and "ended with 1: it can't be done" in dead.error and not await road.published("g3")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "retool"}, "a tool 'python'; the recipe's tools are none"), ({"kind": "tool_loop"}, "needs tools"),
        ({"kind": "multi_agent", "solvers": 3}, "must be a multiple of 6"), ({"kind": "black_box"}, "exactly one"),
        ({"kind": "black_box", "function": "os.getpid"}, "must be async"), ({"kind": "multi_agent", "solvers": 0}, "needs"),
    ],
)  # fmt: skip
def test_agents_refuse_recipes_they_cannot_work_in(settings: dict[str, Any], message: str) -> None:
    plain: Recipe = recipe(agent=settings)
    with pytest.raises(AgentSettingsError, match=message):
        make_agent(settings).check(plain)  # type: ignore[attr-defined]
