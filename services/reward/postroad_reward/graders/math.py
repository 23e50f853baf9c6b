"""`math`: 1 where the response's answer equals the label as mathematics (math-verify, Kydlicek 2025), else 0.

math-verify finds the answer: the last boxed expression, else the last LaTeX or plain one. Its own time limits are off,
because they turn a time-out into a wrong answer: here the grading's deadline ends it, as a failure. A label that can't
be read is a failure too; a response that can't be read is wrong. What is plainly equal or different is told without
sympy, with the verdict that math-verify gives.
"""

from __future__ import annotations

import importlib
import re
from functools import lru_cache
from itertools import product
from typing import Any

from pydantic import Field

from postroad_reward.graders.answers import last_boxed
from postroad_reward.graders.base import Attempt, Grader, Settings
from postroad_reward.graders.difference import certainly_differ, readable

# what sympy and the LaTeX parser raise for expressions they can't handle; MemoryError and others are failures
UNREADABLE = (
    ArithmeticError, AttributeError, AssertionError, LookupError, NotImplementedError, RecursionError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip


_INTEGER = re.compile(r"-?\d{1,15}")
_OPENING, _CLOSING = re.compile(r"(?:\$\$?|\\\[|\\\()\s?$"), re.compile(r"[\s.*]*(?:\$\$?|\\\]|\\\))?[\s.*]*")


class MathSettings(Settings):
    strict: bool = Field(True, description="Variables must have the same names; sets are not tuples.")
    float_rounding: int = Field(6, ge=0, description="Decimal places to which floats are compared.")


def grade(attempt: Attempt, settings: MathSettings) -> float:
    label = str(attempt.label if attempt.label is not None else "").strip()
    box = box_alone(attempt.response)
    if box is None:
        return verdict(label, attempt.response, settings)
    content = last_boxed(box) or ""
    if _INTEGER.fullmatch(label) and _INTEGER.fullmatch(content):
        return float(int(label) == int(content))
    if content == label and (readable(label) or (not _is_marked(label) and _gold(label))):
        return 1.0
    if settings.strict and certainly_differ(label, content, settings.float_rounding):
        return 0.0
    return _cached_verdict(label, box, settings)


def box_alone(response: str) -> str | None:
    r"""The last formula where math-verify sees in it what it sees in the whole response: it is the only \boxed{}, alone in
    its formula, with nothing but the sentence's end behind it."""
    start = response.rfind("\\boxed{")
    content = last_boxed(response[start:]) if start >= 0 else None
    if content is None:
        return None
    before = _OPENING.sub("", response[:start])
    lonely = "\\boxed" not in before and "hope" not in before and "\\boxed" not in content
    complete = all(before.count(left) == before.count(right) for left, right in (("\\(", "\\)"), ("\\[", "\\]")))
    begun = before.rstrip(" ").removesuffix("**")[-1:]
    alone = (
        lonely and complete and before.count("$") % 2 == 0 and (begun in ("", ":", ".", ",", "\n") or begun.isalpha())
    )
    return response[len(before) :] if alone and _CLOSING.fullmatch(response[start + len(content) + 8 :]) else None


def verdict(label: str, response: str, settings: MathSettings) -> float:
    gold = _gold(label)
    if not gold:
        raise ValueError(f"the label {label!r} can't be read as mathematics")
    try:
        answers = _parse(response)
    except UNREADABLE:
        return 0.0
    return float(any(_equal(left, right, settings) for left, right in product(gold, answers)))


_cached_verdict = lru_cache(maxsize=4096)(verdict)


@lru_cache(maxsize=1024)
def _gold(label: str) -> list[Any]:
    return _parse(label if _is_marked(label) else f"${label}$") if label else []


def _is_marked(label: str) -> bool:
    return "$" in label or "\\boxed" in label or "\\(" in label or "\\[" in label


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = importlib.import_module("math_verify").parse(text, parsing_timeout=None, raise_on_error=True)
    return parsed


def _equal(gold: Any, answer: Any, settings: MathSettings) -> bool:
    verify = importlib.import_module("math_verify").verify
    try:
        return bool(verify(
            gold, answer, strict=settings.strict, float_rounding=settings.float_rounding, timeout_seconds=None,
            raise_on_error=True,
        ))  # fmt: skip
    except UNREADABLE:
        return False


GRADER = Grader("math", MathSettings, grade, prepare=lambda settings: _parse("$1$"))
