"""Tokens to text as they come: whole characters only, special tokens left out, cut before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """`push` returns the text that is certain by now; `close` what was held back. `matched` is the stop
    string that was met: nothing comes after it."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        self._start = self._read = 0  # a window of tokens is decoded, so that the cost of a token is constant
        self._held = ""
        self.matched: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(after[len(before) :])

    def close(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        text = self._release(after[len(before) :]) + ("" if self.matched else self._held)
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.matched:
            return ""
        text = self._held + text
        places = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            place, self.matched = min(places)
            self._held = ""
            return text[:place]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
