"""Trainer to rollout worker: one task asks for one group."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from postroad.messages.base import Message


class Sampling(BaseModel):
    """How tokens are sampled. `temperature` 0 is greedy; `top_k` -1 and `top_p` 1 are off. `seed` is the group's:
    member m samples with seed + m, so that a redelivered member can be told from a new one only by its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    stop: tuple[str, ...] = ()
    seed: int | None = None


class EngineFeatures(BaseModel):
    """What the worker asks of the engine beside tokens and log-probabilities."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    routed_experts: bool = False


class RewardSpec(BaseModel):
    """Which grader judges the trajectories, and the row's own data that it needs (label, metadata)."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    grader: str
    settings: dict[str, Any] = Field(default_factory=dict)
    label: Any = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class Task(Message):
    """`id` is the group. `deadline` is in seconds since the epoch; `minimum_version` is the oldest weight version
    that may generate a token of this group (design §4.3)."""

    kind: ClassVar[str] = "task"

    purpose: Literal["train", "eval"] = "train"
    prompt: list[dict[str, Any]]
    members: int = Field(ge=1)
    sampling: Sampling
    agent: dict[str, Any] = Field(default_factory=lambda: {"kind": "single_turn"})
    reward: RewardSpec
    features: EngineFeatures = EngineFeatures()
    row: str
    deadline: float
    minimum_version: int = Field(0, ge=0)

    @property
    def group(self) -> str:
        return self.id
