"""Where every attempt went: the audit's core against tables, and once on a real log."""

from __future__ import annotations

import numpy as np
import pytest

from postroad.audit import Audit, audit_line, read_audit
from postroad.bus import Bus
from postroad.messages import DeadLetter, Dropped, RewardSpec, Sample, Sampling, Step, Task, Trajectory, VersionSpan


def trajectory(group: str, member: int = 0, version: int = 0, digest: str = "d0", purpose: str = "train") -> Trajectory:
    task = Task(
        run="r", id=group, purpose=purpose, prompt=[], members=2, sampling=Sampling(),
        reward=RewardSpec(grader="exact"), row="0", deadline=1.0,
    )  # fmt: skip
    return Trajectory(
        run="r", id=f"{group}.{member}", member=member, task=task, tokens=np.array([1, 2], "i4"),
        loss_mask=np.array([0, 1], "u1"), log_probabilities=np.array([0, -1], "f4"), messages=[{"content": "a"}],
        versions=[VersionSpan(start=1, end=2, version=version, digest=digest)], finish_reason="stop",
    )  # fmt: skip


def graded(attempt: Trajectory) -> list:
    return [attempt, Sample(run="r", id=attempt.id, trajectory=attempt, reward=1.0)]


def step(number: int, samples: list[str], dropped: list[Dropped] | None = None) -> Step:
    groups = sorted({sample.partition(".")[0] for sample in samples})
    return Step(
        run="r", id=str(number), number=number, version=number, digest=f"d{number}", sequences=[], samples=samples,
        groups=groups, dropped=dropped or [],
    )  # fmt: skip


def letter(group: str, member: int | None, stage: str = "trajectory", reason: str = "grader_failed") -> DeadLetter:
    return DeadLetter(run="r", id="1", stage=stage, reason=reason, group=group, member=member)


def result(*messages: object, finished: bool = False, staleness: int = 1) -> dict:
    audit = Audit()
    for message in messages:
        for one in message if isinstance(message, list) else [message]:
            audit.add(one)
    counts = audit.result(staleness=staleness, finished=finished)
    assert counts["acknowledged"] == sum(counts[name] for name in ("trained", "dead", "pending", "lost"))
    assert sum(counts["reasons"].values()) == counts["dead"]
    return counts


A, B = trajectory("g0", 0), trajectory("g0", 1)
START = step(0, [])
DROPPED = Dropped(group="g0", reason="filtered", samples=["g0.0"])
LATE = trajectory("g0", 1)


@pytest.mark.parametrize(("messages", "finished", "expected"), [
    ([], False, {}),
    ([A], False, {"pending": 1}),
    ([A], True, {"lost": 1}),
    ([graded(A)], False, {"pending": 1}),
    ([graded(A)], True, {"lost": 1}),
    ([graded(A), step(1, ["g0.0"])], False, {"trained": 1}),
    ([graded(A), graded(B), step(1, ["g0.0", "g0.1"])], True, {"trained": 2}),
    ([graded(A), graded(B), step(1, ["g0.0"])], False, {"trained": 1, "lost": 1}),
    ([graded(A), step(1, ["g0.0"]), step(2, ["g0.0"])], True, {"trained": 1, "twice": 1}),
    ([A, letter("g0", 0)], True, {"dead": 1}),
    ([graded(A), letter("g0", 0, "sample", "invalid_message")], True, {"dead": 1}),
    ([graded(A), letter("g0", 0), step(1, ["g0.0"])], True, {"trained": 1}),
    ([graded(A), step(1, [], [DROPPED])], False, {"dead": 1}),
    ([graded(A), graded(LATE), step(1, [], [DROPPED])], True, {"dead": 2}),
    ([graded(A), LATE, step(1, [], [DROPPED])], False, {"dead": 1, "pending": 1}),
    ([graded(A), LATE, step(1, [], [DROPPED])], True, {"dead": 1, "lost": 1}),
    ([graded(A), letter("g0", None, "task", "deadline")], False, {"dead": 1}),
    ([A, letter("g0", None, "task", "deadline")], True, {"lost": 1}),
    ([letter("g0", None, "task", "deadline")], True, {}),
    ([step(1, ["g0.0"])], True, {"unacknowledged": 1, "wrong_version": 1}),
])  # fmt: skip
def test_each_attempt_is_in_exactly_one_place(messages, finished, expected):
    counts = result(START, *messages, finished=finished)
    names = ("trained", "dead", "pending", "lost", "twice", "wrong_version", "unacknowledged")
    assert {name: counts[name] for name in names if counts[name]} == expected


@pytest.mark.parametrize(("version", "digest", "number", "staleness", "wrong"), [
    (0, "d0", 1, 0, 0),
    (0, "d0", 2, 1, 0),
    (0, "d0", 2, 0, 1),  # too old
    (0, "dX", 1, 1, 1),  # other content
    (0, "", 1, 1, 0),  # the engine did not say
    (9, "d9", 1, 1, 1),  # never published
    (1, "d1", 1, 1, 1),  # from the future
])  # fmt: skip
def test_versions(version, digest, number, staleness, wrong):
    attempt = graded(trajectory("g0", 0, version, digest))
    steps = [step(n, ["g0.0"] if n == number else []) for n in range(3)]
    assert result(*attempt, *steps, staleness=staleness)["wrong_version"] == wrong


def test_evaluation_is_counted_apart_and_reasons_are_named():
    counts = result(
        graded(trajectory("e0", purpose="eval")), trajectory("e1", purpose="eval"), letter("e1", 0),
        graded(A), step(1, [], [DROPPED]),
    )  # fmt: skip
    assert counts["evaluation"] == {"acknowledged": 2, "graded": 1, "dead": 1}
    assert (counts["reasons"], counts["dead_letters"]) == ({"filtered": 1}, {"grader_failed": 1})
    assert audit_line(counts) == "audit: acknowledged 1 trained 0 dead 1 pending 0 lost 0 twice 0"


async def test_an_audit_reads_the_real_log(nats):
    bus = await Bus.connect(nats.url, "r")
    await bus.create_streams()
    for member in range(3):
        attempt = trajectory("g0", member)
        await bus.publish(bus.subjects.trajectory("g0", member), attempt)
        sample = Sample(run="r", id=attempt.id, trajectory=attempt, reward=0.5)
        await bus.publish(bus.subjects.sample("g0", member), sample)
    await bus.publish(bus.subjects.dead("trajectory"), letter("g0", 2))
    await bus.publish(bus.subjects.step(0), START)
    await bus.publish(bus.subjects.step(1), step(1, ["g0.0", "g0.1"]))
    counts = await read_audit(bus, staleness=0, finished=True)
    await bus.close()
    assert (counts["acknowledged"], counts["trained"], counts["dead"], counts["lost"]) == (3, 2, 1, 0)
    assert (counts["twice"], counts["wrong_version"]) == (0, 0)
