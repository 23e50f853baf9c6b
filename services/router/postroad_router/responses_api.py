"""OpenAI's Responses API as a translation: its items to chat messages, a choice to output items."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any, Literal

import orjson
from pydantic import Field

from postroad_router.errors import ApiError
from postroad_router.openai_types import (
    MAX_MESSAGES,
    MAX_TOKEN,
    Absent,
    ChatRequest,
    Function,
    Open,
    read_chat,
    validated,
)
from postroad_router.responses_store import ResponsesStore
from postroad_router.segments import Segment, SegmentAnswer

SAME = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "minimum_version", "version", "timeout_s")


class FunctionTool(Function):
    type: Literal["function"]


class NamedFunction(Open):
    type: Literal["function"]
    name: str


class Format(Open):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class TextSettings(Open):
    format: Format = Format()


class Reasoning(Open):
    effort: str | None = None


class ResponsesRequest(Open):
    model: str = Field(examples=["postroad"])
    input: str | list[dict[str, Any]] = Field(examples=["Hello"])
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    tools: list[FunctionTool] | None = Field(None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: Literal[True] | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    store: bool | None = None
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    conversation: Absent = None
    prompt: Absent = None
    max_tool_calls: Absent = None


class ResponsesAnswer(SegmentAnswer):
    """`open` reads the request and what it goes on from."""

    def __init__(self, request: ResponsesRequest, chat: ChatRequest, store: ResponsesStore, owner: str) -> None:
        super().__init__(chat)
        self.request, self._store, self._owner = request, store, owner
        self._new, self._sequence = 0, -1
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())

    @classmethod
    async def open(cls, body: dict[str, Any], store: ResponsesStore, owner: str) -> ResponsesAnswer:
        """Raises ApiError."""
        asked = validated(ResponsesRequest, body)
        before = await store.messages(asked.previous_response_id, owner) if asked.previous_response_id else []
        new = _messages(asked.input)
        chat = {name: body[name] for name in SAME if body.get(name) is not None}
        system = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
        chat["messages"] = [*system, *before, *new]
        if len(chat["messages"]) > MAX_MESSAGES:
            raise ApiError(400, f"input: more than {MAX_MESSAGES} messages", param="input", code="invalid_value")
        chat["max_completion_tokens"] = asked.max_output_tokens
        chat["tools"] = [
            {"function": tool.model_dump(exclude={"type"}, exclude_none=True)} for tool in asked.tools or ()
        ]
        choice = asked.tool_choice
        chat["tool_choice"] = {"function": {"name": choice.name}} if isinstance(choice, NamedFunction) else choice
        chat["reasoning_effort"] = asked.reasoning.effort if asked.reasoning else None
        if asked.text is not None and (form := asked.text.format).type != "text":
            wanted = {"json_schema": {"name": form.name, "schema": form.schema_}} if form.type == "json_schema" else {}
            chat["response_format"] = {"type": form.type, **wanted}
        answer = cls(asked, read_chat(chat), store, owner)
        answer._new = len(new)
        return answer

    def begin(self) -> Iterable[bytes]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    async def end(self) -> dict[str, Any]:
        (choice,) = self.exchange.choices
        response = self._response("incomplete" if choice.finish == "length" else "completed")
        if self.request.store is not False:
            said = [*self.asked.messages[len(self.asked.messages) - self._new :], choice.message]
            await self._store.keep(self._owner, self.request.previous_response_id, said, response)
        return response

    def last(self, whole: dict[str, Any]) -> Iterable[bytes]:
        yield self._event(f"response.{whole['status']}", response=whole)

    def broken(self, error: ApiError) -> bytes:
        failure = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self._response("failed") | {"error": failure})

    def _response(self, status: str) -> dict[str, Any]:
        asked, usage = self.request, self.exchange.usage
        done = status in ("completed", "incomplete")
        plain = asked.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "model": asked.model,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [_item(segment, "completed") for segment in self.segments.all] if done else [],
            "usage": {
                "input_tokens": usage["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            } if done else None,
            "parallel_tool_calls": True, "tool_choice": plain.get("tool_choice", "auto"), "tools": plain.get("tools", []),
            "instructions": asked.instructions, "previous_response_id": asked.previous_response_id,
            "max_output_tokens": asked.max_output_tokens, "temperature": asked.temperature, "top_p": asked.top_p,
            "reasoning": plain.get("reasoning"), "text": plain.get("text", {"format": {"type": "text"}}),
            "truncation": "disabled", "metadata": asked.metadata or {}, "store": asked.store is not False,
        }  # fmt: skip

    def change(self, what: str, segment: Segment, text: str) -> Iterable[bytes]:
        place = {"output_index": segment.index, "item_id": f"{PREFIXES[segment.kind]}_{segment.id}"}
        part = place | {"content_index": 0}
        call = segment.kind == "tool_call"
        stem = {"content": "output_text", "reasoning": "reasoning_text", "tool_call": "function_call_arguments"}[
            segment.kind
        ]
        extra: dict[str, Any] = {"logprobs": []} if segment.kind == "content" else {}
        if what == "grow":
            yield self._event(f"response.{stem}.delta", **(place if call else part), **extra, delta=text)
        elif what == "begin":
            empty = _item(
                Segment(segment.kind, segment.index, "", segment.name, segment.call, segment.id), "in_progress"
            )
            parts = empty.pop("content", None)
            empty |= {} if call else {"content": []}
            yield self._event("response.output_item.added", output_index=segment.index, item=empty)
            if parts:
                yield self._event("response.content_part.added", **part, part=parts[0])
        else:
            item = _item(segment, "completed")
            said = {"arguments": segment.text, "name": segment.name} if call else {"text": segment.text}
            yield self._event(f"response.{stem}.done", **(place if call else part), **extra, **said)
            if not call:
                yield self._event("response.content_part.done", **part, part=item["content"][0])
            yield self._event("response.output_item.done", output_index=segment.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        data = orjson.dumps({"type": kind, "sequence_number": self._sequence, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


PREFIXES = {"content": "msg", "reasoning": "rs", "tool_call": "fc"}


def _item(segment: Segment, status: str) -> dict[str, Any]:
    head = {"id": f"{PREFIXES[segment.kind]}_{segment.id}", "status": status}
    if segment.kind == "tool_call":
        return {
            **head,
            "type": "function_call",
            "call_id": segment.call,
            "name": segment.name,
            "arguments": segment.text,
        }
    if segment.kind == "reasoning":
        return {
            **head,
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": segment.text}],
        }
    text = {"type": "output_text", "text": segment.text, "annotations": [], "logprobs": []}
    return {**head, "type": "message", "role": "assistant", "content": [text]}


def _messages(items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as chat messages; thoughts, words and calls of one answer are one message. Raises ApiError 400."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"), f"input.{place}")})
        elif kind == "function_call_output":
            content = _text(item.get("output"), f"input.{place}")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind in ("message", "reasoning", "function_call"):
            _add(messages, kind, item, place)
        else:
            raise ApiError(
                400, f"input.{place}: items of type {kind!r} are not taken", param="input", code="invalid_value"
            )
    return messages


def _add(messages: list[dict[str, Any]], kind: str, item: dict[str, Any], place: int) -> None:
    """A part of an answer, to the answer that it belongs to."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or (kind != "function_call" and ("tool_calls" in last or last["content"])):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if kind == "message":
        last["content"] = _text(item.get("content"), f"input.{place}")
    elif kind == "reasoning":
        last["reasoning_content"] = _text(item.get("content") or item.get("summary"), f"input.{place}")
    else:
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        last.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})


def _text(content: Any, place: str) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [part.get("text") if isinstance(part, dict) and "text" in str(part.get("type")) else None for part in parts]
    if any(not isinstance(text, str) for text in texts):
        raise ApiError(400, f"{place}: has a part that is no text", param=place, code="invalid_value")
    return "".join(str(text) for text in texts)
