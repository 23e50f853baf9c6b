"""What differs between model families: one row each. Everything else is the template's and the tokenizer's own.

A turn that a model has generated is closed by the text that the template writes after an assistant's words; what the
model has written of that already (its end token) is left away. So most families need no junction rule of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class ToolSyntax:
    """Tool calls stand between `open` and `close` ("" is the end of the text). Without `call` that is JSON; else `call`
    finds each one's name and either its arguments (JSON) or its body, in which `parameter` finds keys and values."""

    open: str
    close: str
    call: re.Pattern[str] | None = None
    parameter: re.Pattern[str] | None = None
    tokens: tuple[str, ...] = ()  # markup within


@dataclass(frozen=True)
class Family:
    """`models` are the model_type of config.json. `variables` are given to the template: they keep it from rewriting
    what was said before. `reopens` are end tokens that belong to the next message: they leave the prefix of the next
    turn. `text_arguments`: the template wants tool arguments as JSON text, not as an object."""

    name: str
    models: tuple[str, ...]
    tools: tuple[str, ...]
    variables: dict[str, Any] = field(default_factory=dict)
    reopens: tuple[str, ...] = ()
    text_arguments: bool = False
    harmony: bool = False

    @property
    def syntaxes(self) -> tuple[ToolSyntax, ...]:
        return tuple(SYNTAXES[name] for name in self.tools)

    @property
    def markup(self) -> frozenset[str]:
        """Tokens that are to be seen in the text, even where the tokenizer calls them special."""
        marks = {mark for syntax in self.syntaxes for mark in (syntax.open, syntax.close, *syntax.tokens)}
        return frozenset(marks | set(THINK) | (HARMONY if self.harmony else set()))


HARMONY = {"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"}


def _find(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


_D = "｜DSML｜"
_DSML_CALL = _find(rf'<{_D}invoke name="(?P<name>[^"]+)">(?P<body>.*?)</{_D}invoke>')
_DSML_PARAMETER = _find(
    rf'<{_D}parameter name="(?P<key>[^"]+)"(?P<text> string="true")?[^>]*>(?P<value>.*?)</{_D}parameter>'
)
SYNTAXES = {
    "hermes": ToolSyntax("<tool_call>", "</tool_call>"),
    "llama": ToolSyntax("<|python_tag|>", ""),
    "function": ToolSyntax(
        "<tool_call>", "</tool_call>", _find(r"<function=(?P<name>[^>\n]+)>(?P<body>.*?)</function>"),
        _find(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"),
    ),
    "glm": ToolSyntax(
        "<tool_call>", "</tool_call>",
        _find(r"^\s*(?P<name>[^\s<]+)\s*(?P<body>(?:<arg_key>.*?</arg_key>\s*<arg_value>.*?</arg_value>\s*)*)$"),
        _find(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
        ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "kimi": ToolSyntax(
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
        _find(
            r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^:\s]+):\d+)\s*<\|tool_call_argument_begin\|>"
            r"(?P<arguments>.*?)<\|tool_call_end\|>"
        ),
        tokens=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    "deepseek": ToolSyntax(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        _find(
            r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n```json\n)"
            r"(?P<arguments>.*?)(?:\n```)?<｜tool▁call▁end｜>"
        ),
        tokens=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    "dsml32": ToolSyntax(f"<{_D}function_calls>", f"</{_D}function_calls>", _DSML_CALL, _DSML_PARAMETER, (_D,)),
    "dsml4": ToolSyntax(f"<{_D}tool_calls>", f"</{_D}tool_calls>", _DSML_CALL, _DSML_PARAMETER, (_D,)),
    "minimax": ToolSyntax(
        "<minimax:tool_call>", "</minimax:tool_call>",
        _find(r'<invoke name="?(?P<name>[^">]+)"?>(?P<body>.*?)</invoke>'),
        _find(r'<parameter name="?(?P<key>[^">]+)"?>(?P<value>.*?)</parameter>'),
    ),
}  # fmt: skip

_KEEP = {"clear_thinking": False}
FAMILIES = {
    family.name: family
    for family in (
        Family("default", (), ("hermes",)),
        Family("qwen3", ("qwen3", "qwen3_moe"), ("hermes",), _KEEP),
        Family("qwen35", ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), ("function",), _KEEP),
        Family("qwennext", ("qwen3_next",), ("hermes",), _KEEP),
        Family("glm47", ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), ("glm",), _KEEP, ("<|user|>", "<|observation|>")),
        Family("nemotron3", ("nemotron_h",), ("function",), {"truncate_history_thinking": False}),
        Family("kimi25", ("kimi_k25", "kimi_k2"), ("kimi",), {"preserve_thinking": True}),
        Family("kimi26", ("kimi_k26",), ("kimi",), {"preserve_thinking": True}),
        Family("minimax", ("minimax_m2", "minimax"), ("minimax",), _KEEP),
        Family("deepseekv3", ("deepseek_v3",), ("deepseek",), text_arguments=True),
        Family("deepseekv32", ("deepseek_v32",), ("dsml32",), {"drop_thinking": False}, text_arguments=True),
        Family("deepseekv4", ("deepseek_v4",), ("dsml4",), {"drop_thinking": False}, text_arguments=True),
        Family("gpt-oss", ("gpt_oss",), (), reopens=("<|return|>",), harmony=True),
        Family("llama", ("llama", "smollm3"), ("hermes", "llama")),
    )
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """The family of a model by its config.json, else the default."""
    known = (family for family in FAMILIES.values() if model_type in family.models)
    return next(known, FAMILIES["default"])
