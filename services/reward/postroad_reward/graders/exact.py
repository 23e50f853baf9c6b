"""`exact`: 1 where the normalised response equals the normalised label (or one of a list of labels), else 0.

The normalisations are those of the SQuAD evaluation script (Rajpurkar et al. 2016): case, punctuation, articles, white
space; each is a setting, and only white space is on by itself.
"""

from __future__ import annotations

import re
import string
from typing import Any

from pydantic import Field, field_validator

from postroad_reward.graders.base import Attempt, Grader, Settings

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactSettings(Settings):
    pattern: str | None = Field(
        None, description="Regular expression; the last match in the response (its group 1, if any) is compared."
    )
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_articles: bool = False
    ignore_white_space: bool = Field(True, description="Strip the ends; runs of white space count as one space.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


def grade(attempt: Attempt, settings: ExactSettings) -> float:
    labels = attempt.label if isinstance(attempt.label, list | tuple) else [attempt.label]
    if not labels or any(label is None for label in labels):
        raise ValueError("the exact grader needs a label; does data.label_key name the right column?")
    answer: str | None = attempt.response
    if settings.pattern is not None:
        answer = _last_match(settings.pattern, attempt.response)
    if answer is None:
        return 0.0
    return float(any(normalise(answer, settings) == normalise(label, settings) for label in labels))


def normalise(value: Any, settings: ExactSettings) -> str:
    text = str(value)
    if settings.ignore_case:
        text = text.casefold()
    if settings.ignore_punctuation:
        text = text.translate(_PUNCTUATION)
    if settings.ignore_articles:
        text = _ARTICLES.sub(" ", text)
    if settings.ignore_white_space:
        text = " ".join(text.split())
    return text


def _last_match(pattern: str, text: str) -> str | None:
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return found[-1].group(1) if found[-1].re.groups else found[-1].group()


GRADER = Grader("exact", ExactSettings, grade)
