"""Graders' processes: killed by deadline and memory, replaced, never left behind."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from postroad_reward.errors import GraderFailed, GraderTimeout
from postroad_reward.graders import Attempt
from postroad_reward.pool import Pool

HERE = Path(__file__).parent


@pytest.fixture
async def pool(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    pool = Pool(limit=2)
    await pool.start()
    yield pool
    await pool.close()


async def function(pool, name, response="4", deadline_s=20.0, **metadata):
    settings = {"path": f"example_rewards.{name}"}
    (grade,) = await pool.grade("function", settings, [Attempt([], response, "4", metadata)], deadline_s)
    return grade


async def test_a_hang_costs_its_deadline_and_its_process_and_nothing_else(pool):
    started = time.monotonic()
    with pytest.raises(GraderTimeout, match=r"within 0\.5 s"):
        await function(pool, "hangs", deadline_s=0.5)
    assert time.monotonic() - started < 4
    assert pool.counts["timeout"] == 1
    assert (await function(pool, "length", "four")).reward == 4


async def test_a_graders_children_end_with_it(pool, tmp_path, gone):
    marker = tmp_path / "pid"
    with pytest.raises(GraderTimeout):
        await function(pool, "leaves_a_child_behind", deadline_s=2, marker=str(marker))
    pid = int(marker.read_text())
    async with asyncio.timeout(10):
        while not gone(pid):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "text"),
    [("dies", "ended with code 7"), ("eats_memory", "MemoryError"), ("not_a_number", "finite number, not nan"),
     ("a_word", "not 'good'")],
)  # fmt: skip
async def test_failures_are_named_and_survived(pool, name, text):
    with pytest.raises(GraderFailed, match=text):
        await function(pool, name)
    assert (await function(pool, "length", "four")).reward == 4


async def test_the_graders_own_traceback_is_the_cause(pool):
    with pytest.raises(GraderFailed, match="no rule for '4'") as caught:
        await function(pool, "raises")
    assert 'example_rewards.py", line' in str(caught.value.__cause__)


async def test_what_a_grader_prints_does_not_disturb(pool):
    assert [(await function(pool, "chatters")).reward for _ in range(2)] == [1, 1]


async def test_an_unknown_grader_is_a_matter_of_settings(pool):
    with pytest.raises(GraderFailed, match="did you mean 'exact'") as caught:
        await pool.grade("exactly", {}, [Attempt([], "")], 10)
    assert caught.value.settings


async def test_a_cancelled_grading_ends_its_process(pool, tmp_path):
    grading = asyncio.create_task(function(pool, "slow", journal=str(tmp_path / "journal"), seconds=60))
    async with asyncio.timeout(10):
        while not (tmp_path / "journal").exists():
            await asyncio.sleep(0.02)
    grading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await grading
    assert len(pool._workers) == 0
    assert (await function(pool, "length", "four")).reward == 4


async def test_a_process_killed_while_idle_is_replaced(pool):
    (worker,) = pool._workers
    worker.process.kill()
    await worker.process.wait()
    assert (await function(pool, "length", "four")).reward == 4


async def test_a_grader_that_cannot_be_prepared_is_refused_at_the_start():
    pool = Pool(limit=1, prepare=[("function", {"path": "no_such_module.name"})])
    with pytest.raises(GraderFailed, match=r"no function no_such_module\.name") as caught:
        await pool.start()
    await pool.close()
    assert caught.value.settings


async def test_the_pool_grows_for_graders_that_wait(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    pool = Pool(limit=2)
    try:
        slow = {"journal": str(tmp_path / "journal"), "seconds": 2.0}
        await asyncio.gather(*(function(pool, "slow", str(number), **slow) for number in range(3)))
        assert pool.counts["started"] == 2
    finally:
        await pool.close()
