"""From what a model writes to what a client reads: reasoning, content and tool calls, as the text comes.

Markup that may have begun is held back until it is certain. A tool call is given out when it is complete; one that
can't be read is content, as it was written: nothing is lost.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from postroad_router.families import HARMONY, THINK, Family, ToolSyntax
from postroad_router.text import overlap

Schemas = Mapping[str, Mapping[str, Any]]  # of tools' parameters, by tool


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds to an answer: reasoning, content, or a whole tool call (`text` is its arguments)."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    name: str = ""
    id: str = ""


class Parser(ABC):
    """Takes text as it comes, and keeps in `_text` what is not decided yet."""

    _text = ""

    def push(self, text: str) -> list[Delta]:
        self._text += text
        return self._advance(final=False)

    def close(self) -> list[Delta]:
        return self._advance(final=True)

    @abstractmethod
    def _advance(self, final: bool) -> list[Delta]:
        """What is decided now; with `final`, everything."""


def make_parser(family: Family, tools: Schemas | None, reasoning: bool, forced: bool = False) -> Parser:
    """`tools` is None where no tool may be called; `reasoning`: the prompt ends within the model's thoughts; `forced`:
    the whole text is tool calls in JSON."""
    return HarmonyParser() if family.harmony and not forced else TagParser(family, tools, reasoning, forced)


class TagParser(Parser):
    def __init__(self, family: Family, tools: Schemas | None, reasoning: bool, forced: bool = False) -> None:
        self._tools = tools
        self._syntaxes = () if tools is None else family.syntaxes
        self._syntax: ToolSyntax | None = ToolSyntax("", "") if forced else None
        self._bare_json = tools is not None and "llama" in family.tools
        self._reasoning, self._fresh = reasoning, True  # fresh: nothing of this part has been given out
        self._thought = reasoning
        self._space = ""

    def _advance(self, final: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while True:
            if self._syntax is not None:
                if not self._call(self._syntax, deltas, final):
                    return deltas
            elif not self._until_mark(deltas, final):
                return deltas

    def _until_mark(self, deltas: list[Delta], final: bool) -> bool:
        """Give out what comes before the next mark; False where there is none yet."""
        if self._bare_json and self._fresh and not self._reasoning and self._text.lstrip()[:1] == "{":
            self._syntax, self._fresh = ToolSyntax("", ""), False
            return True
        marks = [syntax.open for syntax in self._syntaxes]
        if self._reasoning:
            marks.append(THINK[1])
        elif self._fresh and not self._thought:  # thoughts come first, or not at all
            lead = self._text.lstrip()[: len(THINK[0])]
            marks += [THINK[0]] if THINK[0].startswith(lead) else []
        found = min(((self._text.find(mark), mark) for mark in marks if mark in self._text), default=None)
        if found is None:
            self._give(deltas, len(self._text) if final else self._certain(marks), trim=False)
            return False
        place, mark = found
        self._give(deltas, place, trim=True)
        self._text = self._text[len(mark) :]
        self._reasoning, self._thought = mark == THINK[0], self._thought or mark in THINK
        self._syntax = next((syntax for syntax in self._syntaxes if syntax.open == mark), None)
        self._fresh = True
        return True

    def _certain(self, marks: list[str]) -> int:
        """How much of the text no mark can follow on: white space waits for what comes after it."""
        held = max((overlap(self._text, mark) for mark in marks), default=0)
        sure = self._text[: len(self._text) - held]
        return len(sure.rstrip()) if marks else len(sure)

    def _give(self, deltas: list[Delta], size: int, trim: bool) -> None:
        text, self._text = self._text[:size], self._text[size:]
        if self._fresh and (self._thought or self._syntax is not None):
            text = text.lstrip()
        if trim:
            self._space = text[len(text.rstrip()) :]
            text = text.rstrip()
        if text:
            self._fresh = False
            deltas.append(Delta("reasoning" if self._reasoning else "content", text))

    def _call(self, syntax: ToolSyntax, deltas: list[Delta], final: bool) -> bool:
        """Give out a tool call that is complete; False where it is not yet."""
        place = self._text.find(syntax.close) if syntax.close else -1
        if place < 0 and not final:
            return False
        body = self._text if place < 0 else self._text[:place]
        self._text = "" if place < 0 else self._text[place + len(syntax.close) :]
        self._syntax, self._thought = None, True
        try:
            deltas += parse_calls(syntax, body, self._tools or {})
        except (ValueError, TypeError, KeyError):
            deltas.append(Delta("content", self._space + syntax.open + body + (syntax.close if place >= 0 else "")))
            self._fresh = False
            return True
        self._fresh = True
        return True


class HarmonyParser(Parser):
    """gpt-oss: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>."""

    def __init__(self) -> None:
        self._header, self._body = "", False

    def _advance(self, final: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while True:
            marks = HARMONY - {"<|channel|>", "<|constrain|>"} if self._body else {"<|message|>"}
            found = min(((self._text.find(mark), mark) for mark in marks if mark in self._text), default=None)
            whole = self._body and "to=" in self._header
            if found is None:
                held = 0 if final else max(overlap(self._text, mark) for mark in marks)
                if self._body and (final or not whole):
                    self._give(deltas, len(self._text) - held, final and whole)
                return deltas
            if self._body:
                self._give(deltas, found[0], whole)
            else:
                self._header = self._text[: found[0]]
            self._text = self._text[found[0] + len(found[1]) :] if found[1] != "<|start|>" else self._text[found[0] :]
            self._body = not self._body

    def _give(self, deltas: list[Delta], size: int, call: bool) -> None:
        text, self._text = self._text[:size], self._text[size:]
        if call and is_json(text):
            name = re.split(r"[\s<]", self._header.partition("to=")[2], maxsplit=1)[0].removeprefix("functions.")
            deltas.append(Delta("tool_call", text.strip(), name, _call_id()))
        elif text:
            deltas.append(Delta("reasoning" if "analysis" in self._header else "content", text))


def parse_calls(syntax: ToolSyntax, body: str, tools: Schemas) -> list[Delta]:
    """The tool calls in `body`. Raises ValueError, TypeError or KeyError where it is none."""
    if syntax.call is None:
        value = json.loads(body)
        return [_json_call(entry) for entry in (value if isinstance(value, list) else [value])]
    found = list(syntax.call.finditer(body))
    if not found or syntax.call.sub("", body).strip():
        raise ValueError("no tool call, or more than tool calls")
    calls = []
    for match in found:
        parts = match.groupdict()
        name = parts["name"].strip()
        if syntax.parameter is None:
            arguments = parts["arguments"].strip() or "{}"
            json.loads(arguments)
        else:
            types = tools.get(name, {}).get("properties") or {}
            values = {
                pair["key"].strip(): _typed(pair["value"], types.get(pair["key"].strip()), bool(pair.get("text")))
                for pair in (each.groupdict() for each in syntax.parameter.finditer(parts["body"]))
            }
            arguments = json.dumps(values, ensure_ascii=False)
        calls.append(Delta("tool_call", arguments, name, parts.get("id") or _call_id()))
    return calls


def _json_call(value: dict[str, Any]) -> Delta:
    arguments = value["arguments"] if "arguments" in value else value.get("parameters", {})
    if not isinstance(value["name"], str) or not isinstance(arguments, dict | str):
        raise TypeError("a tool call needs a name and arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Delta("tool_call", text, value["name"], _call_id())


def _typed(text: str, schema: Any, is_text: bool) -> Any:
    """A parameter's value: text where the tool's schema says so, else what it is in JSON."""
    if is_text or (isinstance(schema, dict) and schema.get("type") == "string"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
