"""Graders that wait for others (the sandbox, a judge, each other), and graders of whole groups."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from postroad.config.recipe import RewardSection
from postroad_reward.errors import GraderFailed, GraderTimeout, InvalidAnswer, JudgeUnavailable
from postroad_reward.graders import Attempt, judging
from postroad_reward.grading import Grading
from postroad_reward.sandbox import SandboxUnavailable

HERE = Path(__file__).parent
PROMPT = [{"role": "user", "content": "Add two numbers."}]


@pytest.fixture
async def grading(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(judging, "BACKOFF_S", 0.01)
    grading = Grading(RewardSection(grader="exact", deadline_s=20, concurrency=4, sandbox={"packages": []}))
    yield grading
    await grading.close()


@pytest.fixture
async def caged(grading):
    try:
        await grading.sandbox.start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return grading


@pytest.fixture
def server():
    """A judge whose replies (status, body) are taken from a list, and whose requests are kept."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, dict(self.headers), body))
            status, reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


async def one(grading, grader, response, label=None, settings=None, metadata=None):
    (grade,) = await grading.grade(grader, settings or {}, [Attempt(PROMPT, response, label, metadata or {})])
    return grade


SUM = "Here:\n```python\nprint(sum(map(int, input().split())))\n```"
PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7.0"]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], [0.1, 0.2], [[1], [2]]], "outputs": [3, 0.3, [1, 2]]}


PROGRAMS = [
    (SUM, PAIRS, 1), (SUM, json.dumps(PAIRS), 1), ("```python\nprint(3)\n```", PAIRS, 0.5), ("print(3)", PAIRS, 0.5),
    ("```\nprint(3)\n```", PAIRS, 0.5), ("```python\nx = 1\n```\nor\n" + SUM, PAIRS, 1), ("I can't.", PAIRS, 0), ("", PAIRS, 0),
    ("```python\ndef add(a, b):\n    print('hm')\n    return a + b\n```", CALLS, 1),
    ("```python\nclass Solution:\n    def add(self, a, b): return a + b\n```", CALLS, 1),
    ("```python\ndef add(a, b): return 3\n```", CALLS, 1 / 3), ("```python\ndef sub(a, b): return a + b\n```", CALLS, 0),
    ("def f(): return 2", ["assert f() == 2", "assert f() == 3"], 0.5),
    ("import os\ndef f(): os._exit(0)", ["assert f() == 2"], 0), ("def f(): exit()", ["assert f() == 2"], 0),
    ("while True: pass", {"inputs": [""], "outputs": [""]}, 0), ("print('x' * 10**7)", {"inputs": [""], "outputs": ["x"]}, 0),
]  # fmt: skip


async def test_code_with_partial_credit(caged):
    settings = {"partial": True, "test_deadline_s": 2}
    results = await asyncio.gather(*(one(caged, "code", response, label, settings) for response, label, _ in PROGRAMS))
    for (response, _, reward), result in zip(PROGRAMS, results, strict=True):
        assert result.reward == pytest.approx(reward), response
        assert result.metrics["passed"] == pytest.approx(reward)


async def test_code_is_all_or_nothing_and_tells_each_test(caged):
    result = await one(caged, "code", "print(3)", PAIRS)
    assert result.reward == 0 and (result.metrics["test_0"], result.metrics["test_1"]) == (1, 0)
    with pytest.raises(GraderFailed, match="can't read its tests from '5'"):
        await one(caged, "code", "print(3)", "5")


def said(text):
    return 200, {"choices": [{"message": {"content": text}}]}


async def test_a_judges_votes_become_a_mean(grading, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.replies = [said("Fine. SCORE: 10"), said("I can't say."), said("**SCORE: 5**"), said("score: 3 no SCORE: 9")]
    settings = {"url": f"{server.url}/v1", "model": "m", "votes": 2, "key_variable": "JUDGE_KEY"}
    result = await one(grading, "judge", "1 + 2 = 3", "3", settings)
    assert result.reward == pytest.approx(0.75) and result.metrics["votes"] == 2  # prose is asked again, not 0
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "m"
    assert "Add two numbers." in body["messages"][0]["content"] and "1 + 2 = 3" in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("replies", "error", "text"),
    [
        ([said("prose")], InvalidAnswer, "no score in 3 answers"), ([said("SCORE: 11")], InvalidAnswer, "no score"),
        ([(200, {"error": "?"})], InvalidAnswer, "no chat completion"), ([(200, b"<html>")], InvalidAnswer, "no JSON"),
        ([(503, b"")], JudgeUnavailable, "failed 3 times; the last: HTTP 503"),
        ([(401, b"no key")], GraderFailed, "HTTP 401: no key"),
    ],
)  # fmt: skip
async def test_a_judge_that_does_not_judge_is_a_typed_failure(grading, server, replies, error, text):
    server.replies = replies
    with pytest.raises(error, match=text):
        await one(grading, "judge", "x", "y", {"url": f"{server.url}/v1", "model": "m"})


async def test_a_judge_that_is_not_there_or_hangs(grading, server):
    with pytest.raises(JudgeUnavailable, match="failed 3 times"):
        await one(grading, "judge", "x", settings={"url": "http://127.0.0.1:9/v1", "model": "m"})
    with pytest.raises(GraderFailed, match="environment has no NO_KEY"):
        await one(grading, "judge", "x", settings={"url": server.url, "model": "m", "key_variable": "NO_KEY"})
    silent = await asyncio.start_server(lambda reader, writer: reader.read(), "127.0.0.1", 0)
    grading.reward = RewardSection(grader="exact", deadline_s=0.3)
    with pytest.raises(GraderTimeout, match=r"within 0\.3 s"):
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        await one(grading, "judge", "x", settings={"url": url, "model": "m"})
    silent.close()


async def test_remote(grading, server):
    server.replies = [(500, b""), (200, {"reward": 0.5, "metrics": {"a": 1}, "b": 2}), (200, 1), (200, {"a": 1})]
    settings = {"url": f"{server.url}/grade"}
    result = await one(grading, "remote", "x", "y", settings, {"k": 1})
    assert (result.reward, result.metrics) == (0.5, {"a": 1, "b": 2})
    assert server.requests[-1][2] == {"prompt": PROMPT, "response": "x", "label": "y", "metadata": {"k": 1}}
    assert (await one(grading, "remote", "x", settings=settings)).reward == 1
    with pytest.raises(InvalidAnswer, match="not a number or an object with a reward"):
        await one(grading, "remote", "x", settings=settings)


async def test_a_combination_weighs_its_parts_wherever_they_run(caged):
    parts = [
        {"grader": "code", "weight": 2}, {"grader": "format", "settings": {"pattern": "p.*"}, "weight": 0.5, "name": "shape"},
        {"grader": "function", "settings": {"path": "example_rewards.length"}, "weight": 0.1},
    ]  # fmt: skip
    result = await one(caged, "combination", "print(3)", PAIRS, {"parts": parts})
    assert result.reward == pytest.approx(0 + 0.5 + 0.8)
    assert result.metrics["code_passed"] == 0.5 and result.metrics["shape"] == 1 and result.metrics["function"] == 8


async def test_groups_are_graded_in_one_call(grading):
    attempts = [Attempt(PROMPT, text) for text in ("ccc", "a", "bb")]
    ranks = {"path": "example_rewards.ranks", "group": True}
    assert [grade.reward for grade in await grading.grade("function", ranks, attempts)] == [2, 0, 1]
    parts = [{"grader": "function", "settings": ranks}, {"grader": "exact", "weight": 10, "name": "right"}]
    labelled = [Attempt(PROMPT, attempt.response, "a") for attempt in attempts]
    assert [grade.reward for grade in await grading.grade("combination", {"parts": parts}, labelled)] == [2, 10, 1]
    with pytest.raises(GraderFailed, match="returned 1 values for a group of 3"):
        await grading.grade("function", {"path": "example_rewards.too_few", "group": True}, attempts)


async def test_limits_bound_the_gradings_of_a_grader(monkeypatch, server):
    grading = Grading(RewardSection(grader="exact", limits={"remote": 1}))
    busy, most = 0, 0

    async def ask(*arguments):
        nonlocal busy, most
        busy, most = busy + 1, max(most, busy + 1)
        await asyncio.sleep(0.02)
        busy -= 1
        return 1

    monkeypatch.setattr(judging, "_post", ask)
    await asyncio.gather(*(one(grading, "remote", "x", settings={"url": server.url}) for _ in range(5)))
    await grading.close()
    assert most == 1


@pytest.mark.parametrize(
    "hostile", ["9**9**9**9", r"$9^{9^{9^9}}$", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^{10^{10}})!}"]
)
async def test_a_hostile_expression_costs_its_limit_and_nothing_else(grading, hostile):
    grading.reward = RewardSection(grader="exact", deadline_s=1.0)
    started = time.monotonic()
    with contextlib.suppress(GraderTimeout, GraderFailed):
        assert (await one(grading, "math", hostile, "5")).reward == 0
    assert time.monotonic() - started < 15  # starting a process with math-verify included
    grading.reward = RewardSection(grader="exact", deadline_s=20)
    assert (await one(grading, "math", r"\boxed{5}", "5")).reward == 1
