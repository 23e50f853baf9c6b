r"""Whether two plain answers certainly differ: a quick no before the sympy of the `math` grader.

Numbers, letters, + - * / ^, \frac, \sqrt, \pi and tuples, sets and intervals of them are evaluated as floats, letters at
one arbitrary point. What can be read in two ways, and what nearly agrees, is left to math-verify.
"""

from __future__ import annotations

import math
import re

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?(?![\d.])|\\[a-zA-Z]+|[a-zA-Z]|[-+*/^(){}]|$)")
_WRAPPED = re.compile(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", re.DOTALL)
_SPACES = re.compile(r"\\[,;:! ]")
_TIMES = ("*", "\\cdot", "\\times")
_LETTERS = set("abchjklmnpqrstuvwxyz")  # e, i, d, f, g, o and capitals may be more than variables
_RELATIVE = 1e-4


class _Unclear(Exception):
    """Not in the grammar, or readable in two ways."""


_UNREADABLE = (_Unclear, ArithmeticError, ValueError, RecursionError)


def readable(text: str) -> bool:
    try:
        _values(text)
    except _UNREADABLE:
        return False
    return True


def certainly_differ(label: str, answer: str, decimals: int) -> bool:
    """`decimals`: places to which floats are compared; a difference below them is none."""
    try:
        left, right = _values(label), _values(answer)
    except _UNREADABLE:
        return False
    if left[0] != right[0] or len(left[1]) != len(right[1]):
        return False
    return any(
        a != b and not abs(a - b) <= max(_RELATIVE * max(abs(a), abs(b)), 2 * 10.0**-decimals)
        for a, b in zip(sorted(left[1]), sorted(right[1]), strict=True)
    )


def _values(text: str) -> tuple[str, list[float]]:
    """The brackets of a tuple, set or interval, and the values in it."""
    text = _SPACES.sub(" ", text.replace("\\left", "").replace("\\right", "")).replace("\\dfrac", "\\frac")
    wrapped = _WRAPPED.fullmatch(text.strip())
    if wrapped and "," in wrapped[2]:
        return wrapped[1] + wrapped[3], [_infinite(part) or _Reader(part).whole() for part in wrapped[2].split(",")]
    return "", [_Reader(text).whole()]


def _infinite(text: str) -> float | None:
    return {"\\infty": math.inf, "+\\infty": math.inf, "-\\infty": -math.inf}.get(text.strip())


class _Reader:
    """Recursive descent over tokens."""

    def __init__(self, text: str) -> None:
        self._tokens, place = [], 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise _Unclear(text)
            self._tokens.append(match[1])
            place = match.end()
        self._tokens.append("")
        self._place = 0

    def whole(self) -> float:
        value = self._sum()
        if self._next or not isinstance(value, float) or not math.isfinite(value):
            raise _Unclear
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._place]

    def _take(self, *expected: str) -> str:
        token = self._next
        if expected and token not in expected:
            raise _Unclear(token)
        self._place += 1
        return token

    def _sum(self) -> float:
        sign = -1.0 if self._next in ("+", "-") and self._take() == "-" else 1.0
        value = sign * self._product()
        while self._next in ("+", "-"):
            sign = -1.0 if self._take() == "-" else 1.0
            value += sign * self._product()
        return value

    def _product(self) -> float:
        value, divided = self._power(), False
        while True:
            if self._next in _TIMES:
                self._take()
                value *= self._power()
            elif self._next == "/":
                self._take()
                value, divided = value / self._power(), True
            elif self._next in _LETTERS or self._next in ("(", "\\sqrt", "\\pi"):
                if divided or (self._next == "(" and self._tokens[self._place - 1].isalpha()):
                    raise _Unclear  # 1/2x, f(x)
                value *= self._power()
            elif self._next in ("", "+", "-", ")", "}"):
                return value
            else:
                raise _Unclear(self._next)  # 7 3/4, 2\frac{1}{2}, x2

    def _power(self) -> float:
        base = self._base()
        if self._next == "^":
            self._take()
            exponent = self._group() if self._next == "{" else self._base()
            result = base**exponent
            if isinstance(result, complex):
                raise _Unclear
            return float(result)
        return base

    def _group(self, opening: str = "{", closing: str = "}") -> float:
        self._take(opening)
        value = self._sum()
        self._take(closing)
        return value

    def _base(self) -> float:
        token = self._next
        if token == "(":
            return self._group("(", ")")
        if token == "{":
            return self._group()
        self._take()
        if token[:1].isdigit():
            return float(token)
        if token in _LETTERS:
            return 1.0 + math.sqrt(ord(token)) / 7
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            return self._group() / self._group()
        if token == "\\sqrt":
            return math.sqrt(self._group())
        raise _Unclear(token)
