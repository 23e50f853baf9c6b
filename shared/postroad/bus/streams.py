"""The streams of design §3 and their subjects. One set serves all runs of a NATS server: a subject names its run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

DUPLICATE_WINDOW_S = 120.0
BLOB_CHUNK_BYTES = 512 * 1024
CLAIM_CHECK_BYTES = 256 * 1024


def _stream(name: str, subject: str, **keywords: object) -> StreamConfig:
    defaults: dict[str, object] = {
        "retention": RetentionPolicy.LIMITS,
        "storage": StorageType.FILE,
        "discard": DiscardPolicy.NEW,  # a full stream refuses (back-pressure); it never drops its old end
        "duplicate_window": DUPLICATE_WINDOW_S,
        "allow_direct": True,
    }
    return StreamConfig(name=name, subjects=[subject], **{**defaults, **keywords})  # type: ignore[arg-type]


STREAMS: dict[str, StreamConfig] = {
    stream.name or "": stream
    for stream in (
        _stream("TASKS", "task.>", retention=RetentionPolicy.WORK_QUEUE, allow_direct=False),
        _stream("TRAJECTORIES", "trajectory.>"),
        _stream("SAMPLES", "sample.>"),
        _stream("STEPS", "step.>"),
        _stream("DEAD", "dead.>"),
        _stream("BLOBS", "blob.>"),
        _stream("EVENTS", "event.>", max_msgs=100_000, discard=DiscardPolicy.OLD),
    )
}

_TOKEN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Subjects:
    """The subjects of one run."""

    run: str

    def __post_init__(self) -> None:
        _check(self.run)

    def task(self, group: str) -> str:
        return f"task.{self.run}.{_check(group)}"

    def trajectory(self, group: str, member: int) -> str:
        return f"trajectory.{self.run}.{_check(group)}.{member}"

    def sample(self, group: str, member: int) -> str:
        return f"sample.{self.run}.{_check(group)}.{member}"

    def step(self, number: int) -> str:
        return f"step.{self.run}.{number}"

    def dead(self, stage: str) -> str:
        return f"dead.{self.run}.{stage}"

    def blob(self, name: str) -> str:
        return f"blob.{self.run}.{_check(name)}"

    def event(self, service: str) -> str:
        return f"event.{self.run}.{_check(service)}"

    def tool(self, holder: str = "") -> str:
        """Where tools are called: any process that serves them, or the one that holds a session. No stream has it."""
        return f"tool.{self.run}.at.{_check(holder)}" if holder else f"tool.{self.run}.any"

    def all(self, stream: str) -> str:
        """The filter that matches this run's messages in `stream`."""
        return f"{(STREAMS[stream].subjects or [''])[0].removesuffix('.>')}.{self.run}.>"


def _check(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ValueError(f"{token!r} can't be part of a NATS subject: use letters, digits, _ and -")
    return token
