"""An answer as a row of parts, as the APIs of Anthropic and OpenAI's Responses have it: thoughts, text, tool calls."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from postroad_router.errors import ApiError
from postroad_router.exchange import Exchange
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


class SegmentAnswer:
    """An answer of one choice that is written segment by segment. Subclasses say what is sent when."""

    exchange: Exchange

    def __init__(self, asked: Any) -> None:
        self.asked, self.segments = asked, Segments()

    def begin(self) -> Iterable[bytes]:
        raise NotImplementedError

    def change(self, what: str, segment: Segment, text: str) -> Iterable[bytes]:
        """A segment begins, grows by `text`, or ends."""
        raise NotImplementedError

    async def end(self) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def last(self, whole: dict[str, Any]) -> Iterable[bytes]:
        raise NotImplementedError

    def broken(self, error: ApiError) -> bytes:
        raise NotImplementedError

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self.exchange.steps()) as steps:
            async for step in steps:
                list(self.segments.push(step.deltas))
        return await self.end()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Raises ApiError where the generation fails before the first token."""
        started = False
        try:
            async with aclosing(self.exchange.steps()) as steps:
                async for step in steps:
                    for event in () if started else self.begin():
                        yield event
                    started = True
                    for event in self._changed(self.segments.push(step.deltas)):
                        yield event
            for event in self._changed(self.segments.close()):
                yield event
            whole = await self.end()
        except ApiError as error:
            if not started:
                raise
            yield self.broken(error)
            return
        for event in self.last(whole):
            yield event

    def _changed(self, changes: Iterable[tuple[str, Segment, str]]) -> Iterator[bytes]:
        for what, segment, text in changes:
            yield from self.change(what, segment, text)
