"""The step log: what each optimizer step consumed and what it made, enough to repeat it bit for bit."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from postroad.messages.arrays import Array
from postroad.messages.base import Message


class Dropped(BaseModel):
    """A group that is counted and not trained: `samples` are those of its members that were acknowledged."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    group: str
    reason: str
    samples: list[str] = Field(default_factory=list)


class Step(Message):
    """Step n (from 1) trained version n-1 on `sequences` of the sample log, in this order, and made version n, whose
    parameters have this `digest`. `dropped` are the groups that were resolved without training since step n-1.
    `teacher_log_probabilities` are those of all trained tokens of the samples, in their order, where a teacher was asked."""

    kind: ClassVar[str] = "step"

    number: int = Field(ge=0)
    version: int = Field(ge=0)
    digest: str
    sequences: list[int]
    samples: list[str]
    groups: list[str]
    dropped: list[Dropped] = Field(default_factory=list)
    staleness_max: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    teacher_log_probabilities: Array | None = None
    seconds: float = 0.0
    created: float = 0.0
