"""Tools over a real NATS: every kind, every status, and what becomes of sessions whose holder dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from postroad.bus import NobodyListens, NoReply, ask
from postroad.config import Environment, RecipeError, load_recipe
from postroad.messages import ToolCall
from postroad.supervisor.servers import free_port
from postroad_reward.tools.base import ToolSettingsError, ToolsLost
from postroad_reward.tools.retriever import server as retriever
from postroad_reward.tools.search import Corpus
from postroad_reward.tools.service import ToolService, check_tools

HERE = Path(__file__).parent
ROWS = [
    {"id": "a", "contents": '"Paris"\nParis is the capital of France.'}, {"title": "Rome", "text": "The capital of Italy."},
    {"contents": "Tea\nGreen tea is a drink."},
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


@contextlib.asynccontextmanager
async def serving(road, *tools):
    """A function that calls a tool: the status and the content; and the service."""
    path = road.recipe(sandbox={"packages": []}, tools=list(tools))
    environment = Environment("r", road.folder, path, road.nats_url, road.redis_url, "key", name="reward-0")
    service, stop = ToolService(environment, load_recipe(path)), asyncio.Event()
    running = asyncio.create_task(service.run(stop))

    async def call(tool="", arguments="", session="s", holder=""):
        message = ToolCall(run="r", id="1", tool=tool, arguments=arguments, session=session, holder=holder)
        result = await ask(road.bus, road.bus.subjects.tool(holder), message, 40)
        return result if not tool else (result.status, result.content)

    async with asyncio.timeout(30):
        while not running.done():
            with contextlib.suppress(NobodyListens):
                await call()
                break
            await asyncio.sleep(0.05)
    try:
        if running.done():
            running.result()
        yield call, service, running
    finally:
        stop.set()
        with contextlib.suppress(ToolsLost):
            await asyncio.wait_for(running, 10)


def function(name, **settings):
    return {"kind": "function", "path": f"example_tools.{name}", **settings}


async def test_functions_are_described_and_called(road):
    tools = [function("add"), function("shout"), function("slow", deadline_s=0.3, concurrency=1), function("raises")]
    async with serving(road, *tools) as (call, *_):
        listed = {tool["function"]["name"]: tool["function"] for tool in (await call()).tools}
        assert listed["add"] == {
            "name": "add", "description": "The sum of two numbers.",
            "parameters": {"additionalProperties": False, "type": "object", "required": ["a"], "properties": {
                "a": {"type": "integer"}, "b": {"type": "integer", "default": 1, "description": "The second one."}}},
        }  # fmt: skip
        assert listed["shout"]["parameters"]["properties"]["how"]["enum"] == ["loud", "louder"]
        assert await call("add", '{"a": 2, "b": 40}') == ("ok", "42")
        assert await call("shout", {"text": "hé"}) == ("ok", '{"loud": "HÉ"}')
        assert await call("raises", "") == ("error", "LookupError: no such thing")
        assert (await call("slow", {"seconds": 1}))[0] == "timeout"
        for arguments in ("{", "[1]", {}, {"a": "x"}, {"a": 1, "c": 2}):
            status, content = await call("add", arguments)
            assert status == "invalid_arguments" and content, arguments
        assert await call("ad", {}) == ("unknown_tool", "there is no tool 'ad'; there are add, raises, shout, slow")


async def test_python_alone_and_in_sessions(road, sandbox):
    tools = [{"kind": "python", "deadline_s": 2, "output_characters": 100},
             {"kind": "python", "name": "cells", "stateful": True, "deadline_s": 2}]  # fmt: skip
    async with serving(road, *tools) as (call, service, _):
        assert await call("python", {"code": "x = 6\nprint(x * 7)"}) == ("ok", "42")
        assert await call("python", {"code": "pass"}) == ("ok", "[no output]")
        status, content = await call("python", {"code": "print(x)"})
        assert status == "error" and "NameError" in content and content.endswith("[exit code 1]")
        status, content = await call("python", {"code": "while True: pass"})
        assert (status, content) == ("timeout", "[stopped after 2 s]")
        status, content = await call("python", {"code": "print('a' * 5000)"})
        assert status == "ok" and len(content) < 150 and "4900 characters left out" in content
        assert await call("cells", {"code": "y = 20"}) == ("ok", "[no output]")
        assert await call("cells", {"code": "y + 1"}, holder=service.holder) == ("ok", "21")
        assert (await call("cells", {"code": "y"}, session="another"))[0] == "error"
        status, content = await call("cells", {"code": "while True: pass"})
        assert status == "timeout" and "variables are gone" in content
        assert (await call("cells", {"code": "y"}, holder=service.holder))[0] == "error"
        await call(session="s", holder=service.holder)  # the end of the attempt
        assert await call("cells", {"code": "1"}, holder=service.holder) == (
            "sandbox_lost",
            "the session s is not open any more",
        )
        holder = service.holder
    with pytest.raises(NobodyListens):
        await ask(road.bus, road.bus.subjects.tool(holder), ToolCall(run="r", id="1"), 5)


async def test_a_call_that_is_given_up_leaves_its_sandbox_to_nobody(road, sandbox):
    async with serving(road, {"kind": "python", "stateful": True, "concurrency": 1, "deadline_s": 20}) as (
        call,
        service,
        _,
    ):
        await call("python", {"code": "1"})
        given_up = asyncio.create_task(service._cells.run("s", "import time; time.sleep(15)", 20))
        await asyncio.sleep(0)
        while not service._cells._open["s"].turn.locked():
            await asyncio.sleep(0.01)
        given_up.cancel()
        await asyncio.wait({given_up})
        assert await call("python", {"code": "print('mine')"}, session="t") == ("ok", "mine")
        (slot,) = service._sandbox._slots
        slot._kill_inner()
        await asyncio.wait_for(slot.process.wait(), 10)
        assert (await call("python", {"code": "1"}, session="t", holder=service.holder))[0] == "sandbox_lost"


async def test_a_holder_that_dies_within_a_call_is_told(road, sandbox):
    async with serving(road, {"kind": "python", "stateful": True}) as (call, service, _):
        await call("python", {"code": "1"})
        service._lost.set()
        message = ToolCall(run="r", id="1", tool="python", arguments={"code": "2"}, session="s", holder=service.holder)
        with pytest.raises((NoReply, NobodyListens)):
            while True:
                await ask(road.bus, road.bus.subjects.tool(service.holder), message, 2)


async def test_search_over_a_corpus_and_over_http(road, corpus):
    web = retriever(Corpus(corpus), "127.0.0.1", 0)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{web.server_port}/retrieve"
    tools = [{"kind": "search", "corpus": str(corpus), "top_k": 2}, {"kind": "search", "name": "web", "url": url, "top_k": 1},
             {"kind": "search", "name": "gone", "url": f"http://127.0.0.1:{free_port()}/retrieve"}]  # fmt: skip
    try:
        async with serving(road, *tools) as (call, *_):
            first = "Doc 1(Title: Paris) Paris is the capital of France."
            assert await call("search", {"query": "capital of France"}) == (
                "ok", f"{first}\nDoc 2(Title: Rome) The capital of Italy.",
            )  # fmt: skip
            assert await call("web", {"query": "capital of France"}) == ("ok", first)
            assert await call("search", {"query": "zebra"}) == ("ok", "[nothing found]")
            assert (await call("gone", {"query": "tea"}))[0] == "sandbox_lost"
        async with httpx.AsyncClient() as http:
            asked = {"queries": ["tea", "italy"], "topk": 1, "return_scores": True}
            (tea,), (rome,) = (await http.post(url, json=asked)).json()["result"]
            assert rome["document"] == {"id": "2", "contents": "Rome\nThe capital of Italy."} and tea["score"] > 0
            assert (await http.post(url, json={"topk": 1})).status_code == 400
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def test_a_broken_corpus_is_named_line_by_line(tmp_path, corpus):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text() + '{"contents": 3}\nnot json\n\n{"title": "x"}\n{"contents": " "}\n')
    with pytest.raises(
        ToolSettingsError, match=r"4 broken lines, at most 0 allowed: line 4: TypeError.*line 5: .*line 7: KeyE"
    ):
        Corpus(broken)
    assert [line[:6] for line in Corpus(broken, 4).broken] == ["line 4", "line 5", "line 7", "line 8"]
    for content, message in (("", "holds no documents"), (None, "can't be read")):
        path = tmp_path / f"{content}.jsonl"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ToolSettingsError, match=message):
            Corpus(path)


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_mcp_servers(road, transport, monkeypatch):
    monkeypatch.setenv("POSTROAD_KEY", "not for others")
    command, started = [sys.executable, str(HERE / "example_tools.py")], None
    section = {"kind": "mcp", "command": command}
    if transport == "http":
        port = free_port()
        started = subprocess.Popen([*command, str(port)], stderr=subprocess.DEVNULL)
        section = {"kind": "mcp", "url": f"http://127.0.0.1:{port}/mcp"}
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(section["url"])
                break
            await asyncio.sleep(0.05)
    try:
        async with serving(road, section, function("add")) as (call, _, running):
            assert {tool["function"]["name"] for tool in (await call()).tools} == {"multiply", "leave", "secret", "add"}
            assert await call("multiply", {"a": 6, "b": 7}) == ("ok", "42")
            assert (await call("multiply", {"a": "x"}))[0] in ("error", "invalid_arguments")
            if transport == "stdio":
                assert await call("secret", {}) == ("ok", "[]")
            assert (await call("leave", {}))[0] == "sandbox_lost"
            with pytest.raises(ToolsLost):
                await asyncio.wait_for(running, 10)
    finally:
        if started is not None:
            started.kill()
            started.wait()


def test_what_cannot_be_served_is_told_by_the_check(road, tmp_path):
    def checked(*tools):
        check_tools(load_recipe(road.recipe(tools=list(tools))).tools)

    checked(function("add"), {"kind": "python"})
    for tool, message in (
        (function("nothing"), "no function example_tools.nothing"), (function("unnamed"), r"\*values: int can't be given"),
        ({"kind": "search", "corpus": "none.jsonl"}, "there is no corpus"),
    ):  # fmt: skip
        with pytest.raises(ToolSettingsError, match=message):
            checked(tool)
    for tool, message in (
        ({"kind": "python", "corpus": "c"}, "takes no corpus"), ({"kind": "mcp"}, "needs one of command and url"),
        ({"kind": "python", "name": "no name"}, "name"), ({"kind": "search", "top": 1}, "did you mean 'top_k'"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            checked(tool)
