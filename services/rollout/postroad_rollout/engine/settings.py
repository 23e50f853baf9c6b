"""Settings of one engine process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["mixed", "prefill", "decode"]


class EngineSettings(BaseModel):
    """Everything that `serve` needs. Sizes are counts of tokens or requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_path: Path
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0 picks a free port")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 where the CPU multiplies it natively, else float32"
    )
    device: str = "cpu"
    threads: int = Field(default=1, ge=1, description="torch threads of the model loop")
    slots: int = Field(default=64, ge=1, description="requests that run at the same time")
    max_length: int | None = Field(
        default=None, ge=2, description="prompt + output; default: the model's maximum, at most 2048"
    )
    max_waiting: int = Field(default=1024, ge=1, description="waiting requests; more get 503")
    prefill_tokens: int = Field(default=256, ge=1, description="prompt tokens computed between two decode steps")
    role: Role = "mixed"
    bootstrap_port: int = Field(default=0, ge=0, le=65535, description="of a prefill engine; 0 picks a free port")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of requests without a sampling_seed")
    secret: str | None = Field(default=None, description="bearer token that callers must send")
    weight_version: int = Field(default=0, ge=0)
    weight_digest: str = ""
    activate_deadline_s: float = Field(default=600.0, gt=0, description="how long mode=finish may drain")
