"""Messages: bytes that stay as they are, arrays without Python integers, and refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad.messages import (
    DeadLetter,
    Event,
    RewardSpec,
    Sample,
    Sampling,
    SchemaError,
    Step,
    Task,
    Trajectory,
    VersionSpan,
    decode,
    encode,
)  # fmt: skip


def task() -> Task:
    return Task(
        run="r", id="g00000001", prompt=[{"role": "user", "content": "2*3?"}], members=2, sampling=Sampling(seed=7),
        reward=RewardSpec(grader="exact", label="6"), row="0", deadline=100.0, minimum_version=1,
    )  # fmt: skip


def trajectory(**changes) -> Trajectory:
    values = {
        "run": "r", "id": "g00000001.0", "member": 0, "task": task(), "tokens": np.array([5, 6, 7, 8], dtype=np.int32),
        "loss_mask": np.array([0, 0, 1, 1], dtype=np.uint8),
        "log_probabilities": np.array([0, 0, -0.5, -1.25], dtype=np.float32),
        "versions": [VersionSpan(start=2, end=4, version=1, digest="d")],
        "routed_experts": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
        "messages": [{"role": "assistant", "content": "6"}], "finish_reason": "stop", "engine": "engine-0", "seconds": 0.5,
    }  # fmt: skip
    return Trajectory(**{**values, **changes})


MESSAGES = {
    "task": task(),
    "trajectory": trajectory(),
    "sample": Sample(run="r", id="g00000001.0", trajectory=trajectory(), reward=0.25),
    "step": Step(run="r", id="1", number=1, version=1, digest="d", sequences=[4, 2], samples=["g.0"], groups=["g"]),
    "dead": DeadLetter(run="r", id="x", stage="task", reason="deadline", payload=b"\x00\xff"),
    "event": Event(run="r", id="1", service="engine", name="joined", fields={"n": 1}, created=2.0),
}
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes_are_still_read_and_written(name):
    """Other versions of postroad read these bytes: a change here needs a new schema version or a new field."""
    golden = bytes.fromhex(GOLDEN[name])
    assert encode(decode(golden)) == encode(MESSAGES[name])
    written, kept = msgpack.unpackb(encode(MESSAGES[name])), msgpack.unpackb(golden)
    assert common(written, kept) == kept


def common(written, kept):
    """`written` without the fields that came after `kept`, at any depth."""
    if isinstance(kept, dict):
        return {key: common(written[key], value) for key, value in kept.items()}
    return written


@pytest.mark.parametrize(
    "message",
    [
        task(),
        Step(run="r", id="1", number=1, version=1, digest="d", sequences=[4, 2], samples=["g.0"], groups=["g"]),
        DeadLetter(run="r", id="x", stage="task", reason="deadline", payload=b"\x00\xff"),
    ],
)
def test_a_message_survives_its_encoding(message):
    assert decode(encode(message)) == message


def test_arrays_survive_and_travel_as_raw_little_endian_bytes():
    sample = Sample(run="r", id="g00000001.0", trajectory=trajectory(), reward=1.0)
    data = encode(sample)
    again = decode(data)
    assert isinstance(again, Sample)
    for name in ("tokens", "loss_mask", "log_probabilities", "routed_experts"):
        before, after = getattr(sample.trajectory, name), getattr(again.trajectory, name)
        assert after.dtype == before.dtype and np.array_equal(before, after)
    wire = msgpack.unpackb(data)["trajectory"]["tokens"]
    assert wire == {"dtype": "i4", "shape": [4], "data": bytes.fromhex("05000000060000000700000008000000")}


def test_unknown_fields_are_ignored_and_newer_schemas_refused():
    body = msgpack.unpackb(encode(task()))
    assert decode(msgpack.packb({**body, "invented_later": 1})) == task()
    with pytest.raises(SchemaError, match="schema 99.*upgrade"):
        decode(msgpack.packb({**body, "schema": 99}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not msgpack"),
        (b"\xc1garbage", "not msgpack"),
        (msgpack.packb([1]), "needs a kind"),
        (msgpack.packb({"kind": "letter", "schema": 1}), "unknown message kind 'letter'"),
        (msgpack.packb({"kind": "task", "schema": 1, "run": "r"}), "does not validate"),
        (b"\x81\x90\x00", "not msgpack"),  # a list as a key
        (msgpack.packb({"kind": ["task"], "schema": 1}), "unknown message kind"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(data, reason):
    with pytest.raises(SchemaError, match=reason):
        decode(data)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data):
    try:
        decode(data)
    except SchemaError:
        assert True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss_mask": np.array([1], dtype=np.uint8)}, "loss_mask has shape"),
        ({"versions": []}, "no weight version"),
        ({"versions": [VersionSpan(start=2, end=3, version=1)]}, "no weight version"),
        ({"routed_experts": np.zeros((4, 2, 2), dtype=np.uint8)}, "does not fit 4 tokens"),
    ],
)
def test_an_inconsistent_trajectory_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        trajectory(**changes)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_is_finite(reward):
    with pytest.raises(ValueError, match="finite"):
        Sample(run="r", id="x", trajectory=trajectory(), reward=reward)


def test_a_damaged_array_is_refused():
    body = msgpack.unpackb(encode(trajectory()))
    body["tokens"]["data"] = body["tokens"]["data"][:-1]
    with pytest.raises(SchemaError, match="needs other than 15 bytes"):
        decode(msgpack.packb(body))
