"""Answers of /v1/chat/completions and /v1/completions: whole ones, and the events of streamed ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson

from postroad_router.choice import Choice
from postroad_router.errors import ApiError
from postroad_router.exchange import Exchange, Step
from postroad_router.openai_types import CompletionRequest


class Answer:
    """The answer to `exchange` in OpenAI's shape. Subclasses say how a choice looks."""

    whole_object, event_object, prefix = "", "", ""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange, self.asked = exchange, exchange.asked
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.asked.model}

    def choice(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def parts(self, step: Step) -> list[dict[str, Any]]:
        """The choice as it is in the step's events."""
        raise NotImplementedError

    async def whole(self) -> dict[str, Any]:
        await self.exchange.whole()
        choices = [
            {"index": index, **self.choice(choice), **self._extensions(choice)}
            for index, choice in enumerate(self.exchange.choices)
        ]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.exchange.usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, an error among them where the generation fails midway. Raises ApiError where it fails
        before the first token."""
        started = False
        usage = {"usage": None} if self.asked.stream_options and self.asked.stream_options.include_usage else {}
        try:
            async with aclosing(self.exchange.steps()) as steps:
                async for step in steps:
                    parts = self.parts(step)
                    if step.chunk.finish:
                        parts[-1] |= self._extensions(step.choice)
                    for part in parts:
                        started = True
                        yield self._event([{"index": step.index, **part}], **usage)
        except ApiError as error:
            if not started:
                raise
            yield event(error.body)
            return
        if usage:
            yield self._event([], usage=self.exchange.usage)
        yield b"data: [DONE]\n\n"

    def _extensions(self, choice: Choice) -> dict[str, Any]:
        return choice.extensions(self.asked.return_token_ids, self.asked.routed_experts)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": self.event_object, "choices": choices, **more})


class ChatAnswer(Answer):
    whole_object, event_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange)
        self._started: set[int] = set()
        self._calls = [0] * len(exchange.choices)

    def choice(self, choice: Choice) -> dict[str, Any]:
        content = choice.content or (None if choice.calls else "")
        return {
            "finish_reason": choice.reason, "message": {**choice.message, "content": content, "refusal": None},
            "logprobs": self._logprobs(choice.listed),
        }  # fmt: skip

    def parts(self, step: Step) -> list[dict[str, Any]]:
        deltas = [self._delta(step, delta.kind, delta) for delta in step.deltas]
        if not deltas and (step.chunk.tokens or step.chunk.finish):
            deltas = [{}]
        if deltas and step.index not in self._started:
            self._started.add(step.index)
            deltas[0] = {"role": "assistant", "content": "", **deltas[0]}
        parts: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None, "logprobs": None} for delta in deltas]
        if parts:
            parts[0]["logprobs"] = self._logprobs(step.choice.entries(step.chunk)) if step.chunk.tokens else None
            parts[-1]["finish_reason"] = step.choice.reason
        return parts

    def _delta(self, step: Step, kind: str, delta: Any) -> dict[str, Any]:
        if kind != "tool_call":
            return {"content" if kind == "content" else "reasoning_content": delta.text}
        number = self._calls[step.index]
        self._calls[step.index] += 1
        function = {"name": delta.name, "arguments": delta.text}
        return {"tool_calls": [{"index": number, "id": delta.id, "type": "function", "function": function}]}

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self.asked.logprobs_wanted is None else {"content": entries, "refusal": None}


class TextAnswer(Answer):
    whole_object, event_object, prefix = "text_completion", "text_completion", "cmpl"
    asked: CompletionRequest

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange)
        self._offsets = [0] * len(exchange.choices)

    def choice(self, choice: Choice) -> dict[str, Any]:
        index = self.exchange.choices.index(choice)
        return {
            "text": choice.content,
            "finish_reason": choice.finish,
            "logprobs": self._logprobs(choice.listed, index),
        }

    def parts(self, step: Step) -> list[dict[str, Any]]:
        if not (step.chunk.tokens or step.chunk.finish):
            return []
        entries = step.choice.entries(step.chunk) if self.asked.logprobs_wanted is not None else []
        text = "".join(delta.text for delta in step.deltas)
        return [{"text": text, "finish_reason": step.chunk.finish, "logprobs": self._logprobs(entries, step.index)}]

    def _logprobs(self, entries: list[dict[str, Any]], index: int) -> dict[str, Any] | None:
        if self.asked.logprobs_wanted is None:
            return None
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }  # fmt: skip


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
