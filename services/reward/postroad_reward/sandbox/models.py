"""What goes into the sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["ok", "error", "killed", "timeout", "memory", "output"]
"""`error`: it ended with another exit code than 0; `killed`: by a signal; the others: by the limit of that name."""


class Limits(BaseModel):
    """What one job may use. `memory_bytes` holds for each process and for all of them together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: int = Field(1 << 30, ge=1 << 26, description="Memory of a job, in bytes.")
    disk_bytes: int = Field(64 << 20, ge=4096, description="Size of a job's /tmp, in bytes.")
    output_bytes: int = Field(256 << 10, ge=1, description="Bytes of standard output, and of standard error.")
    processes: int = Field(32, ge=1, description="Processes and threads of a job.")


@dataclass(frozen=True)
class Job:
    """`code` is run as `__main__`, in /tmp, where `files` (relative path to content) lie."""

    code: str
    stdin: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    deadline_s: float = 10.0

    def __post_init__(self) -> None:
        for path in self.files:
            if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"a job's file must have a relative path without '..', not {path!r}")


@dataclass(frozen=True)
class Result:
    """`exit_code` is the negative number of the signal where one ended it; None where a limit did."""

    status: Status
    stdout: str
    stderr: str
    exit_code: int | None
    seconds: float


class SandboxUnavailable(RuntimeError):
    """The sandbox can't run on this machine; the message has the reason and the remedy."""


class SandboxLost(RuntimeError):
    """The sandbox broke under a job: it is a failure of ours, and a retry may go well."""


class SessionClosed(RuntimeError):
    """The session has ended, by a limit or by its own exit; its state is gone."""
