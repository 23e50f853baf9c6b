r"""`dapo`: 1 where the last "Answer: ..." of the last 300 characters equals the label, else -1 (DAPO, Yu et al. 2025).

Answer and label are normalised as in Minerva (Lewkowycz et al. 2022, appendix D) and compared as text. A \boxed{} counts
only after "Answer:", unless `boxed` is set (DAPO's strict mode): then the last one of the last 100 characters must
equal the label to the letter. A label that is an integer written as a float (3.0) is that integer.
"""

from __future__ import annotations

import re

from pydantic import Field

from postroad_reward.graders.answers import labels_of, last_boxed
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings

_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points", "feet",
    "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students", "childrentickets",
    "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}",
    "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots", "<|im_end|>", "<|endoftext|>",
)  # fmt: skip
_UNWRAPPED = (
    (re.compile(r"(.*?)(\$)(.*?)(\$)(.*)"), r"$\3$"), (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"), (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"), (re.compile(r"(frac)([^{])(.)"), r"frac{\2}{\3}"),
    (re.compile(r"(sqrt)([^{])"), r"sqrt{\2}"), (re.compile(r"\$"), ""),
)  # fmt: skip
_INTEGRAL = re.compile(r"(-?\d+)\.0*")


class DapoSettings(Settings):
    boxed: bool = Field(False, description="Strict mode: only a box near the end counts.")


def grade(attempt: Attempt, settings: DapoSettings) -> Grade:
    (label,) = labels_of(attempt.label, "dapo")
    end = attempt.response[-300:]
    if settings.boxed:
        right = last_boxed(end[-100:]) == label
    else:
        said = _ANSWER.findall(end)
        right = bool(said) and normalise(said[-1]) == _INTEGRAL.sub(r"\1", normalise(label))
    return Grade(1.0 if right else -1.0, {"accuracy": float(right)})


def normalise(answer: str) -> str:
    text = answer.split("=")[-1]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for word in _REMOVED:
        text = text.replace(word, "")
    for pattern, new in _UNWRAPPED:
        text = pattern.sub(new, text)
    plain = text.replace(",", "")
    return (plain if plain.isdigit() else text).strip()


GRADER = Grader("dapo", DapoSettings, grade)
