"""Anthropic's Messages API as a translation: its request to a chat request, a choice to its content blocks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any, Literal

import orjson
from pydantic import Field

from postroad_router.access import shaped
from postroad_router.errors import ApiError
from postroad_router.exchange import Exchange
from postroad_router.openai_types import MAX_MESSAGES, MAX_TOKEN, AnyMessage, ChatRequest, Open, read_chat, validated
from postroad_router.segments import Segment, SegmentAnswer

PATH = "/v1/messages"
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
SAME = ("model", "stream", "temperature", "top_p", "top_k", "max_tokens", "minimum_version", "version", "timeout_s")


class AnthropicTool(Open):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Open):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: Literal[False] | None = None


class Thinking(Open):
    type: Literal["enabled", "adaptive", "disabled"]


class CountRequest(Open):
    model: str = Field(examples=["postroad"])
    messages: list[AnyMessage] = Field(
        min_length=1, max_length=MAX_MESSAGES, examples=[[{"role": "user", "content": "Hello"}]]
    )
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=1024)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1, le=MAX_TOKEN, examples=[256])
    stream: bool = False
    stop_sequences: list[str] | None = Field(None, max_length=16)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN)


def chat_request(body: dict[str, Any], model: type[CountRequest] = MessagesRequest) -> ChatRequest:
    """The chat request that says the same. Raises ApiError 400."""
    asked = validated(model, body)
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    chat = {name: body[name] for name in SAME if body.get(name) is not None}
    chat["messages"] = [*system, *(each for place, m in enumerate(asked.messages) for each in _messages(m, place))]
    if asked.tools:
        chat["tools"] = [
            {"function": {"name": tool.name, "parameters": tool.input_schema}
             | ({"description": tool.description} if tool.description else {})} for tool in asked.tools
        ]  # fmt: skip
    if (choice := asked.tool_choice) is not None:
        names = {"auto": "auto", "any": "required", "none": "none"}
        chat["tool_choice"] = names.get(choice.type) or {"function": {"name": choice.name}}
    if asked.thinking is not None:
        thinks = asked.thinking.type != "disabled"
        chat["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
    if isinstance(asked, MessagesRequest):
        chat["stop"] = asked.stop_sequences
    return read_chat(chat)


def _messages(message: dict[str, Any], place: int) -> Iterable[dict[str, Any]]:
    """One of Anthropic's messages as those of OpenAI: a tool's result is a message of its own there."""
    blocks = message.get("content")
    if not isinstance(blocks, list):
        yield {"role": message.get("role"), "content": blocks}
        return
    if not all(isinstance(block, dict) for block in blocks):
        raise ApiError(400, f"messages.{place}.content must be blocks", param=f"messages.{place}", code="invalid_value")
    by_type: dict[Any, list[dict[str, Any]]] = {}
    for block in blocks:
        by_type.setdefault(block.get("type"), []).append(block)
    for result in by_type.pop("tool_result", []):
        yield {"role": "tool", "tool_call_id": result.get("tool_use_id"), "content": result.get("content")}
    thoughts = [str(block.get("thinking", "")) for block in by_type.pop("thinking", [])]
    by_type.pop("redacted_thinking", None)
    calls = [
        {"id": call.get("id"), "function": {"name": call.get("name"), "arguments": call.get("input")}}
        for call in by_type.pop("tool_use", [])
    ]
    rest = [block for each in by_type.values() for block in each]
    if rest or thoughts or calls:
        more = {"reasoning_content": "".join(thoughts)} | ({"tool_calls": calls} if calls else {})
        yield {"role": message.get("role"), "content": rest} | more


class MessagesAnswer(SegmentAnswer):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.asked)
        self.exchange = exchange

    def begin(self) -> Iterable[bytes]:
        message = self._message([], stop_reason=None, stop_sequence=None, usage=self._usage())
        yield _event("message_start", message=message)

    def change(self, what: str, segment: Segment, text: str) -> Iterable[bytes]:
        yield _segment_event(what, segment, text)

    async def end(self) -> dict[str, Any]:
        return self._message([_block(segment) for segment in self.segments.all], **self._end(), usage=self._usage())

    def last(self, whole: dict[str, Any]) -> Iterable[bytes]:
        yield _event("message_delta", delta=self._end(), usage=self._usage())
        yield _event("message_stop")

    def broken(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + orjson.dumps(shaped(PATH, error)) + b"\n\n"

    def _message(self, content: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": self.asked.model}
        return {**head, "content": content, **more}

    def _end(self) -> dict[str, Any]:
        (choice,) = self.exchange.choices
        reason = "stop_sequence" if choice.stop_string is not None else REASONS[choice.reason or "stop"]
        return {"stop_reason": reason, "stop_sequence": choice.stop_string}

    def _usage(self) -> dict[str, int]:
        usage = self.exchange.usage
        return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}


def _block(segment: Segment) -> dict[str, Any]:
    if segment.kind == "tool_call":
        return {"type": "tool_use", "id": segment.call, "name": segment.name, "input": _object(segment.text)}
    if segment.kind == "reasoning":
        return {"type": "thinking", "thinking": segment.text, "signature": ""}
    return {"type": "text", "text": segment.text}


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"arguments": text}


def _segment_event(what: str, segment: Segment, text: str) -> bytes:
    if what == "begin":
        empty = Segment(
            segment.kind, segment.index, "{}" if segment.kind == "tool_call" else "", segment.name, segment.call
        )
        return _event("content_block_start", index=segment.index, content_block=_block(empty))
    if what == "end":
        return _event("content_block_stop", index=segment.index)
    deltas = {
        "content": {"type": "text_delta", "text": text}, "reasoning": {"type": "thinking_delta", "thinking": text},
        "tool_call": {"type": "input_json_delta", "partial_json": text},
    }  # fmt: skip
    return _event("content_block_delta", index=segment.index, delta=deltas[segment.kind])


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"
