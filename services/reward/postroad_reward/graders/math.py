"""`math`: 1 where the response's answer equals the label as mathematics (math-verify, Kydlicek 2025), else 0.

math-verify finds the answer: the last boxed expression, else the last LaTeX or plain one. Its own time limits are off,
because they turn a time-out into a wrong answer: here the grading's deadline ends it, as a failure. A label that can't
be read is a failure too; a response that can't be read is wrong.
"""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

from pydantic import Field

from postroad_reward.graders.base import Attempt, Grader, Settings

# what sympy and the LaTeX parser raise for expressions they can't handle; MemoryError and others are failures
_UNREADABLE = (
    ArithmeticError, AttributeError, AssertionError, LookupError, NotImplementedError, RecursionError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip


class MathSettings(Settings):
    strict: bool = Field(True, description="Variables must have the same names; sets are not tuples.")
    float_rounding: int = Field(6, ge=0, description="Decimal places to which floats are compared.")


def grade(attempt: Attempt, settings: MathSettings) -> float:
    label = str(attempt.label if attempt.label is not None else "").strip()
    gold = _parse(label if _is_marked(label) else f"${label}$") if label else []
    if not gold:
        raise ValueError(f"the label {attempt.label!r} can't be read as mathematics")
    try:
        answers = _parse(attempt.response)
    except _UNREADABLE:
        return 0.0
    return float(any(_equal(left, right, settings) for left, right in product(gold, answers)))


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
    except _UNREADABLE:
        return False


GRADER = Grader("math", MathSettings, grade, prepare=lambda settings: _parse("$1$"))
