"""`exact`: 1 where the normalised answer equals the normalised label (or one of a list of labels), else 0.

The normalisations are those of the SQuAD evaluation script (Rajpurkar et al. 2016): case, punctuation, articles, white
space; each is a setting, and only white space is on by itself. Search-R1's reward is this grader with the pattern
`(?s)<answer>(.*?)</answer>` and all of them.
"""

from __future__ import annotations

import re
import string
from typing import Any

from pydantic import Field

from postroad_reward.graders.answers import AnswerSettings, labels_of
from postroad_reward.graders.base import Attempt, Grader

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactSettings(AnswerSettings):
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_articles: bool = False
    ignore_white_space: bool = Field(True, description="Strip the ends; runs of white space count as one space.")


def grade(attempt: Attempt, settings: ExactSettings) -> float:
    labels = labels_of(attempt.label, "exact")
    answer = settings.answer(attempt.response)
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


GRADER = Grader("exact", ExactSettings, grade)
