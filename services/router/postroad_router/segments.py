"""An answer as a row of parts, as the APIs of Anthropic and OpenAI's Responses have it: thoughts, text, tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from postroad_router.parsers import Delta


@dataclass
class Segment:
    """`text` are a tool call's arguments. `id` is that of the part, `call` that of the tool call."""

    kind: Literal["reasoning", "content", "tool_call"]
    index: int
    text: str = ""
    name: str = ""
    call: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Segments:
    """Fed with deltas; each turns into what happens to a segment: it begins, it grows by a text, it ends."""

    def __init__(self) -> None:
        self.all: list[Segment] = []
        self._open = False

    def push(self, deltas: list[Delta]) -> Iterator[tuple[Literal["begin", "grow", "end"], Segment, str]]:
        for delta in deltas:
            if self._open and (delta.kind != self.all[-1].kind or delta.kind == "tool_call"):
                yield from self.close()
            if not self._open:
                self.all.append(Segment(delta.kind, len(self.all), name=delta.name, call=delta.id))
                self._open = True
                yield "begin", self.all[-1], ""
            self.all[-1].text += delta.text
            yield "grow", self.all[-1], delta.text

    def close(self) -> Iterator[tuple[Literal["begin", "grow", "end"], Segment, str]]:
        if self._open:
            self._open = False
            yield "end", self.all[-1], ""
