"""Chunks of tokens as chat completions: whole ones, and the events of streamed ones."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np

from postroad_router.errors import ApiError
from postroad_router.generation import Finish, TokenChunk, version_spans
from postroad_router.merge import merged
from postroad_router.openai_types import ChatRequest
from postroad_router.template import Vocabulary
from postroad_router.text import TextStream


class Choice:
    """One answer as it grows."""

    def __init__(self, chat: ChatRequest, prompt: list[int], vocabulary: Vocabulary) -> None:
        self._chat, self._prompt, self._vocabulary = chat, prompt, vocabulary
        self._text = TextStream(vocabulary.decode, chat.stop_strings)
        self.tokens: list[int] = []
        self._log_probabilities: list[float] = []
        self._versions: list[int] = []
        self._digests: dict[int, str] = {}
        self._engine = ""
        self._experts: np.ndarray | None = None
        self.finish: Finish | None = None

    def push(self, chunk: TokenChunk) -> str:
        """Take a chunk; the text that it adds."""
        self.tokens += chunk.tokens
        self._log_probabilities += chunk.log_probabilities
        self._versions += chunk.versions
        self._digests |= chunk.digests
        self._engine, self.finish, self._experts = chunk.engine, chunk.finish, chunk.routed_experts
        text = self._text.push(chunk.tokens)
        return text + self._text.close() if chunk.finish else text

    def extensions(self) -> dict[str, Any]:
        """What a client gets that asked for token ids."""
        if not self._chat.return_token_ids:
            return {}
        used = set(self._versions)
        fields: dict[str, Any] = {
            "token_ids": self.tokens, "prompt_token_ids": self._prompt, "token_logprobs": self._log_probabilities,
            "versions": [list(span) for span in version_spans(self._versions)],
            "digests": {str(version): digest for version, digest in self._digests.items() if version in used},
            "engine": self._engine,
        }  # fmt: skip
        if self._experts is not None:
            fields["routed_experts"] = {
                "dtype": self._experts.dtype.str.lstrip("<|"), "shape": list(self._experts.shape),
                "data": base64.b64encode(self._experts.tobytes()).decode(),
            }  # fmt: skip
        return fields

    def log_probabilities(self, chunk: TokenChunk) -> dict[str, Any] | None:
        """OpenAI's `logprobs` of the chunk's tokens, where asked for."""
        if not self._chat.logprobs:
            return None
        tops = chunk.top or [[] for _ in chunk.tokens]
        entries = zip(chunk.tokens, chunk.log_probabilities, tops, strict=True)
        return {"content": [{**self._entry(token, value), "top_logprobs": [self._entry(t, v) for v, t in top]}
                            for token, value, top in entries], "refusal": None}  # fmt: skip

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        raw = self._vocabulary.token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}


class Answer:
    """All choices of one request, fed from the dispatcher's chunks."""

    def __init__(self, chat: ChatRequest, prompt: list[int], vocabulary: Vocabulary) -> None:
        self._chat, self._prompt = chat, prompt
        self._choices = [Choice(chat, prompt, vocabulary) for _ in range(chat.n)]
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}

    async def whole(self, generations: list[AsyncGenerator[TokenChunk, None]]) -> dict[str, Any]:
        """The chat.completion."""
        texts = [""] * self._chat.n
        content: list[list[Any]] = [[] for _ in texts]
        async with aclosing(merged(generations)) as events:
            async for number, chunk in events:
                texts[number] += self._choices[number].push(chunk)
                content[number] += (self._choices[number].log_probabilities(chunk) or {}).get("content", [])
        choices = [
            {
                "index": number, "finish_reason": choice.finish,
                "message": {"role": "assistant", "content": texts[number], "refusal": None},
                "logprobs": {"content": content[number], "refusal": None} if self._chat.logprobs else None,
                **choice.extensions(),
            }
            for number, choice in enumerate(self._choices)
        ]  # fmt: skip
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def events(self, generations: list[AsyncGenerator[TokenChunk, None]]) -> AsyncGenerator[bytes, None]:
        """Server-sent events of chat.completion.chunk, an error among them where the generation fails midway. Raises
        ApiError where it fails before the first token."""
        started: set[int] = set()
        try:
            async with aclosing(merged(generations)) as events:
                async for number, chunk in events:
                    delta: dict[str, Any] = {} if number in started else {"role": "assistant", "content": ""}
                    started.add(number)
                    choice = self._choices[number]
                    if (text := choice.push(chunk)) or not delta:
                        delta["content"] = text
                    if text or chunk.tokens or chunk.finish:
                        yield self._event([self._streamed(number, choice, chunk, delta)])
        except ApiError as error:
            if not started:
                raise
            yield _data(error.body)
            return
        if self._chat.stream_options and self._chat.stream_options.include_usage:
            yield self._event([], usage=self._usage())
        yield b"data: [DONE]\n\n"

    def _streamed(self, number: int, choice: Choice, chunk: TokenChunk, delta: dict[str, Any]) -> dict[str, Any]:
        extensions = choice.extensions() if chunk.finish else {}
        return {
            "index": number, "delta": delta, "finish_reason": chunk.finish,
            "logprobs": choice.log_probabilities(chunk) if chunk.tokens else None, **extensions,
        }  # fmt: skip

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return _data({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})

    def _usage(self) -> dict[str, int]:
        completion = sum(len(choice.tokens) for choice in self._choices)
        prompt = len(self._prompt)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
