"""Reward to trainer: a graded trajectory."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field, field_validator

from postroad.messages.arrays import Array
from postroad.messages.base import Message
from postroad.messages.trajectory import Trajectory


class Sample(Message):
    """`id` is the trajectory's, so that grading twice gives the same sample. `teacher_log_probabilities` [T] are the
    teacher's, aligned to the trajectory's tokens, for distillation."""

    kind: ClassVar[str] = "sample"

    trajectory: Trajectory
    reward: float
    metrics: dict[str, float] = Field(default_factory=dict)
    seconds: float = 0.0
    teacher_log_probabilities: Array | None = None

    @field_validator("reward")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"a reward must be finite, not {value}")
        return value

    @property
    def group(self) -> str:
        return self.trajectory.group

    @property
    def member(self) -> int:
        return self.trajectory.member
