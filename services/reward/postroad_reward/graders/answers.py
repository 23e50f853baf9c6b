"""Where in a response the answer stands."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from postroad_reward.graders.base import Settings

_BOXED = re.compile(r"\\boxed\s*\{")


class AnswerSettings(Settings):
    """Which part of the response is graded; without either setting all of it."""

    pattern: str | None = Field(
        None, description="Regular expression; the last match in the response (its group 1, if any) is the answer."
    )
    boxed: bool = Field(False, description=r"The answer is what the last \boxed{} holds.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    def answer(self, response: str) -> str | None:
        """None where the response has no answer."""
        if self.pattern is not None:
            return last_match(self.pattern, response)
        return last_boxed(response) if self.boxed else response


def last_match(pattern: str, text: str) -> str | None:
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return found[-1].group(1) if found[-1].re.groups else found[-1].group()


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} holds, braces balanced; None where there is none or it is not closed."""
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    depth, begin = 1, starts[-1].end()
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def after_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]


def labels_of(label: object, grader: str) -> list[str]:
    """The accepted answers. Raises ValueError where there is none."""
    labels = list(label) if isinstance(label, list | tuple) else [label]
    if not labels or any(item is None for item in labels):
        raise ValueError(f"the {grader} grader needs a label; does data.label_key name the right column?")
    return [str(item) for item in labels]


def without_fence(text: str) -> str:
    """A response that is one fenced block, as what is in it."""
    fenced = re.fullmatch(r"\s*```\w*\n?(.*?)\n?```\s*", text, re.DOTALL)
    return fenced[1] if fenced else text.strip()
