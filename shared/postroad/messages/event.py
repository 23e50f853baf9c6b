"""Life-cycle events: an engine joined, a version was activated, a process was restarted."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from postroad.messages.base import Message


class Event(Message):
    kind: ClassVar[str] = "event"

    service: str
    name: str
    fields: dict[str, Any] = Field(default_factory=dict)
    created: float = 0.0
