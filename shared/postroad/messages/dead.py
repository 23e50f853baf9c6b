"""Whatever exhausted its deliveries, with its typed reason, intact."""

from __future__ import annotations

from typing import ClassVar, Literal

from postroad.messages.base import Message

DeadReason = Literal[
    "deadline", "deliveries_exhausted", "invalid_message", "invalid_answer", "grader_failed", "judge_unavailable",
    "sandbox_lost", "timeout", "refused_by_engine",
]  # fmt: skip


class DeadLetter(Message):
    """`payload` is the original message as it was published; `source` its subject and `sequence` its place there."""

    kind: ClassVar[str] = "dead"

    stage: Literal["task", "trajectory", "sample"]
    reason: DeadReason
    error: str = ""
    traceback: str = ""
    group: str = ""
    member: int | None = None
    source: str = ""
    sequence: int = 0
    payload: bytes = b""
    created: float = 0.0
