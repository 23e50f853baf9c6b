"""Errors that clients see, in OpenAI's shape, and those of engines, which the dispatcher deals with."""

from __future__ import annotations

from typing import Any, Literal

FailureKind = Literal["connect", "status", "dropped", "silent", "garbage", "stale", "busy", "aborted"]
HEALTHY_FAILURES = ("busy", "aborted")  # what an engine in good health may answer


class ApiError(Exception):
    """Answered as {"error": {message, type, param, code}} with `status`."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class EngineFailure(Exception):
    """An engine did not do its part; another one may. `prefill` says that it was the prefill engine of a pair."""

    def __init__(self, kind: FailureKind, detail: str, *, prefill: bool = False) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.prefill = kind, prefill


class EngineRefusal(Exception):
    """An engine says that the request itself is wrong; no other engine will take it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
