"""Every family's markup, cut at every place: what is given out does not depend on how the text came."""

from __future__ import annotations

from typing import Any

import pytest

from postroad_router.families import FAMILIES
from postroad_router.parsers import make_parser

D = "｜DSML｜"
KIMI = (
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{"a":1}<|tool_call_end|>'
)
CALL = ("tool_call", '{"a": 1}', "f")
CASES: dict[str, tuple[str, str, bool, list[tuple[str, str, str]]]] = {
    "qwen3": ("qwen3", '<think>\nhm\n</think>\n\nSo. \n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', False,
              [("reasoning", "hm", ""), ("content", "So.", ""), CALL]),
    "two calls": ("qwen3", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
                  False, [CALL, ("tool_call", "{}", "g")]),
    "thoughts that never end": ("qwen3", "<think>hm <tool", False, [("reasoning", "hm <tool", "")]),
    "a prompt that ends in thoughts": ("qwennext", "hm</think>yes", True, [("reasoning", "hm", ""), ("content", "yes", "")]),
    "thinking is no markup later": ("qwen3", "a <think> b", False, [("content", "a <think> b", "")]),
    "no call": ("qwen3", "x <tool_call>{}</tool_call> y", False, [("content", "x <tool_call>{}</tool_call> y", "")]),
    "cut off": ("qwen3", 'x <tool_call>{"name": "f", "arg', False, [("content", 'x <tool_call>{"name": "f", "arg', "")]),
    "qwen35": ("qwen35", "t</think><tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n2\n</parameter>\n"
               "</function>\n</tool_call>", True, [("reasoning", "t", ""), ("tool_call", '{"a": 1, "s": "2"}', "f")]),
    "nemotron3": ("nemotron3", "<tool_call>\n<function=g>\n</function>\n</tool_call>", False, [("tool_call", "{}", "g")]),
    "glm47": ("glm47", "<think>t</think><tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", False,
              [("reasoning", "t", ""), CALL]),
    "kimi25": ("kimi25", KIMI + "<|tool_calls_section_end|>", False, [("tool_call", '{"a":1}', "f")]),
    "kimi26": ("kimi26", "t</think>so" + KIMI + "<|tool_calls_section_end|>", True,
               [("reasoning", "t", ""), ("content", "so", ""), ("tool_call", '{"a":1}', "f")]),
    "deepseekv3": ("deepseekv3", 'ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a":1}\n```'
                   "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", False, [("content", "ok", ""), ("tool_call", '{"a":1}', "f")]),
    "deepseekv32": ("deepseekv32", f'r</think>\n\n<{D}function_calls>\n<{D}invoke name="f">\n<{D}parameter name="a" '
                    f'string="true">1</{D}parameter>\n</{D}invoke>\n</{D}function_calls>', True,
                    [("reasoning", "r", ""), ("tool_call", '{"a": "1"}', "f")]),
    "deepseekv4": ("deepseekv4", f'<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="a" string="false">1</{D}parameter>'
                   f"\n</{D}invoke>\n</{D}tool_calls>", False, [CALL]),
    "minimax": ("minimax", '<think>r</think>hey\n<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">1</parameter>\n'
                "</invoke>\n</minimax:tool_call>", False, [("reasoning", "r", ""), ("content", "hey", ""), CALL]),
    "gpt-oss": ("gpt-oss", "<|channel|>analysis<|message|>r<|end|><|start|>assistant<|channel|>commentary to=functions.f "
                '<|constrain|>json<|message|>{"a": 1}<|call|>', False, [("reasoning", "r", ""), CALL]),
    "gpt-oss, final": ("gpt-oss", "<|channel|>final<|message|>Hi there<|return|>", False, [("content", "Hi there", "")]),
    "gpt-oss, cut off": ("gpt-oss", '<|channel|>commentary to=functions.f<|message|>{"a', False, [("content", '{"a', "")]),
    "llama": ("llama", '{"name": "f", "parameters": {"a": 1}}', False, [CALL]),
    "llama, no call": ("llama", "{not json", False, [("content", "{not json", "")]),
    "llama, marked": ("llama", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', False, [CALL]),
    "smollm": ("llama", '<tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call>', False, [CALL]),
    "plain": ("default", " plain \n text \n ", False, [("content", " plain \n text \n ", "")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_markup_cut_at_every_place(name: str) -> None:
    family, text, reasoning, expected = CASES[name]
    schemas = {"f": {"properties": {"s": {"type": "string"}}}}
    for size in (*range(1, 9), len(text)):
        parser = make_parser(FAMILIES[family], schemas, reasoning)
        parts: list[list[Any]] = []
        for start in range(0, len(text), size):
            for delta in parser.push(text[start : start + size]):
                _add(parts, delta)
        for delta in parser.close():
            _add(parts, delta)
        assert [tuple(part) for part in parts] == expected, size


def _add(parts: list[list[Any]], delta: Any) -> None:
    if parts and parts[-1][0] == delta.kind != "tool_call":
        parts[-1][1] += delta.text
    else:
        parts.append([delta.kind, delta.text, delta.name])


def test_every_family_is_tried() -> None:
    assert {case[0] for case in CASES.values()} == FAMILIES.keys()
