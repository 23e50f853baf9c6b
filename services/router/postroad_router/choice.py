"""One answer as it grows: its tokens exactly, and what a client reads of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from postroad_router.generation import Finish, TokenChunk, version_spans
from postroad_router.parsers import Delta, Parser
from postroad_router.template import Vocabulary
from postroad_router.text import TextStream

Reason = Literal["stop", "length", "tool_calls"]


class Choice:
    """Fed with chunks. `parser` is None for plain text. `alternatives` are listed beside each token's log-probability;
    None: no log-probabilities are listed."""

    def __init__(
        self, prompt: Sequence[int], vocabulary: Vocabulary, text: TextStream, parser: Parser | None = None,
        alternatives: int | None = None,
    ) -> None:  # fmt: skip
        self.prompt, self._vocabulary, self._text, self._parser = prompt, vocabulary, text, parser
        self._listing = alternatives is not None
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.versions: list[int] = []
        self.digests: dict[int, str] = {}
        self.engine = ""
        self.experts: np.ndarray | None = None
        self.unmatched: tuple[int, ...] = ()
        self.finish: Finish | None = None
        self.listed: list[dict[str, Any]] = []
        self._parts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self.calls: list[dict[str, Any]] = []

    def push(self, chunk: TokenChunk) -> list[Delta]:
        """Take a chunk; what it adds."""
        self.tokens += chunk.tokens
        self.log_probabilities += chunk.log_probabilities
        self.versions += chunk.versions
        self.digests |= chunk.digests
        self.engine, self.finish, self.experts = chunk.engine, chunk.finish, chunk.routed_experts
        self.unmatched = chunk.unmatched
        if self._listing:
            self.listed += self.entries(chunk)
        text = self._text.push(chunk.tokens)
        if chunk.finish:
            text += self._text.close()
        if self._parser is None:
            deltas = [Delta("content", text)] if text else []
        else:
            deltas = self._parser.push(text) if text else []
            deltas += self._parser.close() if chunk.finish else []
        for delta in deltas:
            self._take(delta)
        return deltas

    def _take(self, delta: Delta) -> None:
        if delta.kind == "tool_call":
            function = {"name": delta.name, "arguments": delta.text}
            self.calls.append({"id": delta.id, "type": "function", "function": function})
        else:
            self._parts[delta.kind].append(delta.text)

    @property
    def content(self) -> str:
        return "".join(self._parts["content"])

    @property
    def reasoning(self) -> str:
        return "".join(self._parts["reasoning"])

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._text.matched

    @property
    def reason(self) -> Reason | None:
        return "tool_calls" if self.calls and self.finish == "stop" else self.finish

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, in the spelling of `conversation`."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        return message | ({"tool_calls": self.calls} if self.calls else {})

    def entries(self, chunk: TokenChunk) -> list[dict[str, Any]]:
        """OpenAI's log-probability entries of the chunk's tokens."""
        tops = chunk.top or [[] for _ in chunk.tokens]
        entries = zip(chunk.tokens, chunk.log_probabilities, tops, strict=True)
        return [
            {**self._entry(token, value), "top_logprobs": [self._entry(t, v) for v, t in top]}
            for token, value, top in entries
        ]

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        raw = self._vocabulary.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}

    def extensions(self, token_ids: bool, experts: bool) -> dict[str, Any]:
        """postroad's own fields of a choice: the weight versions, and where asked for all that is exact to the token."""
        spans = [list(span) for span in version_spans(self.versions)]
        if not token_ids:
            return {"versions": spans}
        used = set(self.versions)
        fields: dict[str, Any] = {
            "token_ids": self.tokens, "prompt_token_ids": list(self.prompt), "token_logprobs": self.log_probabilities,
            "versions": spans, "digests": {str(v): digest for v, digest in self.digests.items() if v in used},
            "engine": self.engine,
        }  # fmt: skip
        if experts and self.experts is not None:
            fields["routed_experts"] = {
                "dtype": self.experts.dtype.str.lstrip("<|"), "shape": list(self.experts.shape),
                "unmatched": list(self.unmatched),
                "data": base64.b64encode(self.experts.tobytes()).decode(),
            }  # fmt: skip
        return fields
