"""Chat messages in one spelling, whatever API or agent they come from; and as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from postroad_router.errors import ApiError
from postroad_router.families import Family

Message = dict[str, Any]  # role, content, and where there are any: reasoning_content, tool_calls, tool_call_id, name


@dataclass(frozen=True)
class Asked:
    """What a client says: messages in this module's spelling, tools, and the template's own variables."""

    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


def plain_messages(messages: Sequence[Any]) -> list[Message]:
    """Content as one text, tool arguments as JSON text, nothing that is empty. Raises ApiError 400."""
    return [_plain(message, f"messages.{place}") for place, message in enumerate(messages)]


def for_template(messages: Sequence[Message], family: Family) -> list[Message]:
    """Messages as `family`'s chat template takes them."""
    return [_for_template(message, family) for message in messages]


def _for_template(message: Message, family: Family) -> Message:
    if family.harmony and "reasoning_content" in message:
        message = {**message, "thinking": message["reasoning_content"]}
    if message["role"] == "developer" and not family.harmony:
        message = {**message, "role": "system"}
    if family.text_arguments or "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}


def _plain(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _fault(place, "role must be a text such as user")
    role = message["role"]
    plain: Message = {"role": role, "content": _text(message.get("content"), f"{place}.content")}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if role == "assistant" and isinstance(reasoning, str):
        plain["reasoning_content"] = reasoning
    for name in ("tool_call_id", "name"):
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                raise _fault(place, f"{name} must be a text")
            plain[name] = value
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise _fault(place, "tool_calls must be a list, in an assistant's message")
        plain["tool_calls"] = [_call(call, f"{place}.tool_calls.{number}") for number, call in enumerate(calls)]
    return plain


def _text(content: Any, place: str) -> str:
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise _fault(place, "has a part that is no text")
        return "".join(str(part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise _fault(place, "must be text or a list of parts")
    return content or ""


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _fault(place, "must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str | None) or not isinstance(call.get("id"), str | None):
        raise _fault(place, "id and function.arguments must be texts")
    return {
        "id": call.get("id") or "",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments or "{}"},
    }


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    try:
        value = json.loads(call["function"]["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**call["function"], "arguments": value}} if isinstance(value, dict) else call


def _fault(place: str, what: str) -> ApiError:
    return ApiError(400, f"{place}: {what}", param=place, code="invalid_value")
