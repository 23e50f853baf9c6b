r"""`deepscaler`: 1 where the last \boxed{} after </think> equals the label, else 0 (DeepScaleR, Luo et al. 2025).

Equal is what Hendrycks' MATH comparison (strings, normalised) or the sympy comparison of PRM800K (Lightman et al. 2023)
calls equal: 2/4 is not 1/2, and both brackets of an interval count. Without </think> or ###Response the answer is wrong.
"""

from __future__ import annotations

import importlib
import math
import re

from pydantic import Field

from postroad_reward.graders.answers import labels_of, last_boxed
from postroad_reward.graders.base import Attempt, Grader, Settings
from postroad_reward.graders.math import UNREADABLE

_UNITS = "degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
_UNIT = re.compile(rf"(?:{_UNITS})(?:es|s)?\s*(?:\^[0-9]+|\^\{{[0-9]+\}})?")
_MATHD = (
    (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"), (r"\\left|\\right", ""), (r"\^\{?\\circ\}?", ""), (r"\\\$", ""),
    (r"\\text\{ .*$", ""), (r"\\?%", ""), (r"(^|[ {])\.", r"\g<1>0."), (r"^.{1,2}= ?", ""), (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r" ", ""), (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"), (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
)  # fmt: skip
_PLAIN = (
    (r"\\text\{\s*(.*?)\s*\}", r"\1"), (r"\\?[%$]", ""), (r"\s+(?:or|and)\s+", ","), ("million", "*10^6"),
    ("billion", "*10^9"), ("trillion", "*10^12"), (r"\^ ?\{?\\circ\}?", ""), (r"\\[dt]frac", r"\\frac"),
    (r"\\left|\\right", ""), (r"\\frac\s*\{([\w.]+)\}\s*\{([\w.]+)\}", r"\1/\2"),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\frac(\d)(\d)", r"\1/\2"),
    (r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)"), (r"\\pi|π", "pi"), (r"\\infty|∞", "inf"), (r"\\cup|∪", "U"),
    (r"\\cdot|\\times|·|×", "*"), (r"\\[,!;: ]|\\", ""), (r"- ", "-"), (r"(?<=\d) +(\d+)/(\d+)", r"+(\1)/(\2)"), (r" ", ""),
    (r"(?<=\d),(?=\d{3}(?:\D|$))", ""), (r"^\{(.*)\}$", r"\1"), (r"(?<=\d)\.0+(?!\d)", ""),
)  # fmt: skip
_FRACTION = re.compile(r"-?\d+/\d+")
_OUT_OF_REACH = re.compile(r"\^\(|\^\d+\^|\^\d\d+")
_HARMLESS = re.compile(r"(?!.*\.[a-z])[\w+\-*/^().,|!=<>]+", re.ASCII)  # sympy evaluates what it parses as Python


class DeepScalerSettings(Settings):
    thinking: bool = Field(True, description="The answer must stand after </think>, as published; off: anywhere.")


def grade(attempt: Attempt, settings: DeepScalerSettings) -> float:
    response = attempt.response
    if "</think>" in response:
        response = response.rpartition("</think>")[2]
    elif "###Response" in response:
        response = response.partition("###Response")[2]
    elif settings.thinking:
        return 0.0
    labels = [last_boxed(label) if "\\boxed" in label else label for label in labels_of(attempt.label, "deepscaler")]
    answer = last_boxed(response)
    return float(answer is not None and any(label is not None and equal(answer, label) for label in labels))


def equal(answer: str, label: str) -> bool:
    if not label.strip():
        raise ValueError("the label is empty")
    if _rewrite(answer.strip(), _MATHD) == _rewrite(label.strip(), _MATHD):
        return True
    mine, theirs = _plain(answer), _plain(label)
    if not mine:
        return False
    if mine == theirs:
        return True
    left, right = _elements(mine), _elements(theirs)
    if len(left) != len(right) or (len(right) > 1 and (mine[0], mine[-1]) != (theirs[0], theirs[-1])):
        return False
    return all(_same(one, other) for one, other in zip(left, right, strict=True))


def _rewrite(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


def _plain(text: str) -> str:
    return re.sub("[{}]", "", _rewrite(_UNIT.sub("", _rewrite(text.strip(), _PLAIN[:1])), _PLAIN[1:])).lower()


def _elements(text: str) -> list[str]:
    wrapped = len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not set(text[1:-1]) & set("()[]")
    return [part.strip() for part in text[1:-1].split(",")] if wrapped else [text]


def _same(answer: str, label: str) -> bool:
    if answer == label:
        return True
    if (_FRACTION.fullmatch(answer) and _FRACTION.fullmatch(label)) or _integral(answer) != _integral(label):
        return False
    letters = {letter for letter in re.sub("sqrt", "", answer + label) if letter.isalpha()}
    both = (answer, label)
    if len(letters) > 2 or any(_OUT_OF_REACH.search(text) or not _HARMLESS.fullmatch(text) for text in both):
        return False
    return "_" not in answer + label and _difference_is_zero(answer, label)


def _integral(text: str) -> bool:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return False
    return math.isfinite(value) and abs(value - round(value)) <= 1e-7


def _difference_is_zero(answer: str, label: str) -> bool:
    parser = importlib.import_module("sympy.parsing.sympy_parser")
    rules = (*parser.standard_transformations, parser.implicit_multiplication_application, parser.convert_xor)
    try:
        difference = parser.parse_expr(f"({answer})-({label})", transformations=rules)
        return bool(importlib.import_module("sympy").simplify(difference) == 0)
    except UNREADABLE:
        return False


GRADER = Grader("deepscaler", DeepScalerSettings, grade, prepare=lambda settings: _difference_is_zero("1", "1"))
