"""The hop on a real road: every trajectory becomes one sample or one dead letter, whatever dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from postroad.config import Environment, load_recipe
from postroad.messages import RewardSpec, decode, encode
from postroad_reward.sandbox import SandboxLost
from postroad_reward.service import RewardService

RG = {"task": "products", "settings": {}, "seed": 1, "size": 1,
      "entry": {"question": "3 * 4", "answer": "12", "metadata": {}}}  # fmt: skip


async def until(condition, deadline_s=30.0):
    """Wait until the condition, plain or async, holds."""
    async with asyncio.timeout(deadline_s):
        while True:
            value = condition()
            if await value if asyncio.iscoroutine(value) else value:
                return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def serving(road, **reward):
    path = road.recipe(**reward)
    environment = Environment("r", road.folder, path, road.nats_url, road.redis_url, "key", name="reward-0")
    service, stop = RewardService(environment, load_recipe(path)), asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        await until(lambda: service.state != "start" or running.done())
        yield service
    finally:
        stop.set()
        await asyncio.wait_for(running, 10)


@pytest.fixture
def process(road):
    """Start services as processes of their own; all of them are gone at the end."""
    started = []

    def start(**reward):
        started.append(road.start_process(road.recipe(**reward)))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def log(road) -> str:
    return (road.folder / "reward.log").read_text()


async def registered(road):
    return [member["state"] for member in (await road.store.members("reward")).values()] == ["ready"]


async def test_grading_end_to_end(road):
    specs = [
        (RewardSpec(grader="math", label="1/2"), r"\boxed{0.5}"), (RewardSpec(grader="exact", label="yes"), "no"),
        (RewardSpec(grader="positions", label="1234"), "12"), (road.function("length"), "four"),
        (RewardSpec(grader="reasoning_gym", settings={"answer": "last_number"}, metadata=RG), "it is 12"),
    ]  # fmt: skip
    sent = [road.trajectory(member, spec, response) for member, (spec, response) in enumerate(specs)]
    async with serving(road) as service:
        await road.send(*sent)
        await until(lambda: service.hop.counts.get("done") == len(sent))
        members = await road.store.members("reward")
    samples = {sample.member: sample for sample in await road.samples()}
    assert {member: sample.reward for member, sample in samples.items()} == {0: 1, 1: 0, 2: 0.5, 3: 4, 4: 1}
    assert all(samples[sent_.member].trajectory.id == sent_.id for sent_ in sent)
    assert members["reward-0"]["pid"] == os.getpid() and not await road.letters()
    assert await road.store.members("reward") == {}


async def test_what_fails_for_good_is_dead_with_traceback_and_payload(road):
    raising, unknown = road.trajectory(0, road.function("raises")), road.trajectory(1, RewardSpec(grader="maths"))
    nan = road.trajectory(2, road.function("not_a_number"))
    async with serving(road, deliveries=2) as service:
        await road.send(raising, unknown, nan)
        await until(lambda: service.hop.counts.get("dead_grader_failed") == 3)
        assert service.hop.counts["retry_grader_failed"] == 2  # the unknown grader is not tried again
    letters = {letter.member: letter for letter in await road.letters()}
    assert {letter.reason for letter in letters.values()} == {"grader_failed"}
    assert (
        'example_rewards.py", line' in letters[0].traceback and "LookupError: no rule for '4'" in letters[0].traceback
    )
    assert "did you mean 'math'" in letters[1].error and "finite number, not nan" in letters[2].error
    assert decode(letters[0].payload).model_dump_json() == raising.model_dump_json()
    assert not await road.samples()


async def test_a_failure_that_passes_is_retried_and_is_no_zero(road):
    async with serving(road) as service:
        await road.send(road.trajectory(0, road.function("raises_once", marker=str(road.folder / "marker"))))
        await until(lambda: service.hop.counts.get("done") == 1)
    assert [sample.reward for sample in await road.samples()] == [1.0] and not await road.letters()


async def test_a_hang_is_killed_and_the_service_lives_on(road):
    async with serving(road, deliveries=2, deadline_s=1.0) as service:
        await road.send(*(
            road.trajectory(member, road.function("hangs_on_request"), "hang" if member == 1 else "fine")
            for member in range(6)
        ))  # fmt: skip
        await until(lambda: service.hop.counts.get("done") == 5 and service.hop.counts.get("dead_timeout") == 1)
        assert service.grading.pool.counts["timeout"] == 2
    assert [sample.reward for sample in await road.samples()] == [1.0] * 5
    (letter,) = await road.letters()
    assert (letter.member, letter.reason) == (1, "timeout") and "did not answer within 1 s" in letter.error


async def test_garbage_and_other_messages_are_dead(road):
    subjects = road.bus.subjects
    async with serving(road) as service:
        await road.bus.jetstream.publish(subjects.trajectory("g00000000", 0), b"garbage")
        task = road.trajectory(1, RewardSpec(grader="exact", label="4")).task
        await road.bus.publish(subjects.trajectory("g00000000", 1), task)
        await until(lambda: service.hop.counts.get("dead_invalid_message") == 2)
    assert [letter.payload == b"garbage" for letter in await road.letters()].count(True) == 1


async def test_a_sample_in_the_log_is_not_graded_again(road):
    sent = road.trajectory(0, road.function("slow", journal=str(road.folder / "journal"), seconds=0))
    async with serving(road) as service:
        await road.send(sent)
        await until(lambda: service.hop.counts.get("done") == 1)
        await road.bus.jetstream.publish(road.bus.subjects.trajectory("g00000000", 0), encode(sent))
        await until(lambda: service.hop.counts.get("done") == 2)
    assert (road.folder / "journal").read_text() == "4\n" and len(await road.samples()) == 1


async def test_kill_under_load_loses_nothing_and_grades_nothing_twice(road, process, gone):
    journal, count = road.folder / "journal", 40
    spec = road.function("slow", journal=str(journal), seconds=0.1)
    begun = lambda: len(journal.read_text().split()) if journal.exists() else 0  # noqa: E731
    await road.send(*(road.trajectory(member, spec, f"m{member}") for member in range(count)))
    for target in (5, 15):
        service = process(deliveries=5)
        await until(lambda: begun() >= target, 60)
        workers = [int(pid) for pid in Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()]
        service.kill()
        service.wait()
        await until(lambda: all(gone(worker) for worker in workers), 5)
        assert workers
    last = process(deliveries=5)

    async def all_there():
        return len(await road.samples()) >= count

    await until(all_there, 60)
    last.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(last.wait, 10) == 0, log(road)
    assert sorted(sample.member for sample in await road.samples()) == list(range(count))
    assert all(sample.id == f"g00000000.{sample.member}" for sample in await road.samples())
    assert not await road.letters() and begun() > count  # those that were in hand were graded again


async def test_a_group_is_graded_in_one_call_when_all_of_it_is_there(road):
    journal = road.folder / "journal"
    settings = {"path": "example_rewards.ranks", "group": True}
    spec = RewardSpec(grader="function", settings=settings, label="4", metadata={"journal": str(journal)})
    sent = [road.trajectory(member, spec, "x" * (8 - member)) for member in range(8)]
    async with serving(road, grader="function", settings=settings) as service:
        await road.send(*sent[:7])
        await until(lambda: len(service.hop.counts) == 0 and service.state == "ready")
        await road.send(sent[7])
        await until(lambda: service.hop.counts.get("done") == 8)
    assert {sample.member: sample.reward for sample in await road.samples()} == {m: 7 - m for m in range(8)}
    assert journal.read_text() == "8\n" and not await road.letters()


async def test_a_group_that_stays_incomplete_is_dead_by_its_deadline(road, monkeypatch):
    monkeypatch.setattr("postroad_reward.service.GROUP_SLACK_S", 0.0)
    settings = {"path": "example_rewards.ranks", "group": True}
    sent = road.trajectory(0, RewardSpec(grader="function", settings=settings))
    sent = sent.model_copy(update={"task": sent.task.model_copy(update={"deadline": time.time() + 1})})
    async with serving(road, grader="function", settings=settings) as service:
        await road.send(sent)
        await until(lambda: service.hop.counts.get("dead_deadline") == 1)
    (letter,) = await road.letters()
    assert "g00000000.0: its group of 8 was not complete" in letter.error and not await road.samples()


async def test_failures_of_others_have_their_own_reasons(road, monkeypatch):
    monkeypatch.setattr("postroad_reward.graders.judging.BACKOFF_S", 0.01)
    judge = RewardSpec(grader="judge", settings={"url": "http://127.0.0.1:9/v1", "model": "m"})
    code = RewardSpec(grader="code", label={"inputs": [""], "outputs": [""]})
    async with serving(road, deliveries=2) as service:
        monkeypatch.setattr(service.grading.sandbox, "run", lost)
        await road.send(road.trajectory(0, judge), road.trajectory(1, code))
        await until(lambda: {"dead_judge_unavailable", "dead_sandbox_lost"} <= service.hop.counts.keys())
    letters = {letter.member: letter for letter in await road.letters()}
    assert {member: letter.reason for member, letter in letters.items()} == {0: "judge_unavailable", 1: "sandbox_lost"}
    assert letters[0].error.count("g00000000.0: ") == 1 and not await road.samples()


async def lost(job):
    raise SandboxLost("the sandbox has ended")


async def command(road, *arguments):
    environment = road.environment(road.recipe())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "postroad.command.main", "dead", *arguments, env=environment, stdout=-1, stderr=-1
    )
    output, error = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, output.decode(), error.decode()


async def test_dead_letters_are_listed_retried_and_dropped(road):
    marker = road.folder / "marker"
    twice = road.trajectory(0, road.function("raises_until", marker=str(marker)))
    async with serving(road, deliveries=1) as service:
        await road.send(twice, road.trajectory(1, road.function("raises")))
        await until(lambda: service.hop.counts.get("dead_grader_failed") == 2)
        _, output, error = await command(road, "list", "--json")
        rows = {row["of"]: row for row in map(json.loads, output.splitlines())}
        assert rows.keys() == {"g00000000.0", "g00000000.1"}, error
        assert "LookupError" in rows["g00000000.1"]["traceback"] and "payload" not in rows["g00000000.1"]
        marker.touch()
        assert (await command(road, "retry", str(rows["g00000000.0"]["number"])))[:2] == (0, "1 letter put back\n")
        await until(lambda: service.hop.counts.get("done") == 1)
    code, _, error = await command(road, "drop", "999")
    assert code == 2 and "no letter 999" in error
    assert (await command(road, "drop", "--all", "--reason", "grader_failed"))[:2] == (0, "1 letter dropped\n")
    assert not await road.letters() and [sample.id for sample in await road.samples()] == [twice.id]


async def test_without_bubblewrap_a_service_that_needs_it_does_not_start(road, process):
    service = process(grader="code", sandbox={"packages": ["no-such-package"]})
    assert await asyncio.to_thread(service.wait, 30) == 3
    assert "pip install no-such-package" in log(road)


async def test_sigterm_drains_within_five_seconds_and_gives_back_what_it_has_not_finished(road, process):
    journal = road.folder / "journal"
    long, short = (road.function("slow", journal=str(journal), seconds=seconds) for seconds in (60, 1.0))
    service = process()
    await until(lambda: registered(road))
    await road.send(road.trajectory(0, long, "long"), road.trajectory(1, short, "short"))
    await until(lambda: journal.exists() and len(journal.read_text().split()) == 2)
    started = time.monotonic()
    service.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(service.wait, 10) == 0, log(road)
    assert time.monotonic() - started < 5.0
    assert [sample.member for sample in await road.samples()] == [1]
    consumer = await road.bus.jetstream.consumer_info("TRAJECTORIES", "reward-r")
    assert consumer.num_ack_pending == 1


@pytest.mark.parametrize(
    ("reward", "text"),
    [({"grader": "positionss"}, "did you mean 'positions'"), ({"grader": "exact", "settings": {"x": 1}}, "no setting 'x'"),
     ({"grader": "function", "settings": {"path": "example_rewards.missing"}}, "no function example_rewards.missing")],
)  # fmt: skip
async def test_a_recipe_that_cannot_be_graded_ends_the_service_at_once(road, process, reward, text):
    service = process(**reward)
    assert await asyncio.to_thread(service.wait, 20) == 3
    assert text in log(road)
