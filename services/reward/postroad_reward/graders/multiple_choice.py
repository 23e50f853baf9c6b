"""`multiple_choice`: 1 where the response chooses the right letter (GPQA, Rein et al. 2023), else 0.

The row's metadata may have `choices` (a list, or a mapping of letters), `correct_letter` and `correct_answer`; the label
is a letter, an index (an integer) or the text of a choice. What stands before </think> is not looked at. The letter is
what the last "answer is X" (option, choice; "X is correct") says, else the last letter that stands alone; a letter inside
a word, the article "A" and the pronoun "I" are none. Without a letter, the right choice's text decides, if no other
choice's text is there.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from postroad_reward.graders.answers import after_thinking
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings

_LETTER = r"[\s:*_\"'`$({\[]*(?:\\(?:boxed|text|mathbf|textbf)\{)*([A-Za-z])(?![\w'’])"
_STATED = (
    re.compile(rf"(?i:\b(?:answer|option|choice)\b\s*(?:is|:|=)){_LETTER}"),
    re.compile(r"(?<![\w'’])[(*]*([A-Z])[)*.]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|best))\b"),
    re.compile(rf"(?i:\b(?:answer|option|choice)\b){_LETTER}"),
)
_ALONE = re.compile(r"(?<![\w'’\\])([A-Z])(?![\w'’])(?!(?<=A)\s+[a-z])(?!(?<=I)\s+[a-z])")
_WORDS = re.compile(r"\w+")


class MultipleChoiceSettings(Settings):
    pass


def grade(attempt: Attempt, settings: MultipleChoiceSettings) -> Grade:
    choices = _choices(attempt.metadata.get("choices"))
    correct, text = _correct(attempt, choices)
    letters = attempt.metadata.get("valid_letters") or list(choices) or list("ABCDEFGH")
    response = after_thinking(attempt.response)
    chosen = extract(response, [str(letter).upper() for letter in letters])
    if chosen is not None and correct is not None:
        return Grade(float(chosen == correct), {"answered": 1.0})
    others = [other for letter, other in choices.items() if letter != correct and other != text]
    said = text is not None and _has(response, text) and not any(_has(response, other) for other in others)
    return Grade(float(said), {"answered": float(chosen is not None or said)})


def extract(response: str, letters: list[str]) -> str | None:
    """The chosen letter; None where none is stated."""
    for pattern in _STATED:
        found = [match for match in pattern.finditer(response) if match.group(1).upper() in letters]
        said = [
            match.group(1).upper() for match in found if match.group(1).isupper() or _marked(response[match.end() :])
        ]
        if said:
            return said[-1]
    alone = [letter for letter in _ALONE.findall(response) if letter in letters]
    return alone[-1] if alone else None


def _marked(rest: str) -> bool:
    """Whether a small letter is one by itself: "answer is a" may go on with "dog"."""
    return not rest.lstrip(" ")[:1].isalpha()


def _choices(given: Any) -> dict[str, str]:
    if isinstance(given, Mapping):
        return {str(letter).upper(): str(text) for letter, text in given.items()}
    return dict(zip(string.ascii_uppercase, map(str, given or ()), strict=False))


def _correct(attempt: Attempt, choices: dict[str, str]) -> tuple[str | None, str | None]:
    """The right letter and the right text, as far as they are known. Raises ValueError where neither is."""
    label, letter, text = attempt.label, attempt.metadata.get("correct_letter"), attempt.metadata.get("correct_answer")
    if isinstance(label, int) and not isinstance(label, bool) and letter is None:
        letter = string.ascii_uppercase[label] if 0 <= label < max(len(choices), 1) else None
    elif isinstance(label, str) and re.fullmatch(r"\s*\(?[A-Za-z]\)?\s*", label) and letter is None:
        letter = label.strip(" ()")
    elif label is not None and text is None:
        text = str(label)
    if letter is None and text is not None:
        letter = next((name for name, choice in choices.items() if _plain(choice) == _plain(text)), None)
    if letter is None and text is None:
        raise ValueError(f"the label {label!r} is no letter, index or text of a choice, and metadata name none")
    letter = None if letter is None else str(letter).upper()
    return letter, str(text) if text is not None else choices.get(letter or "")


def _plain(text: str) -> str:
    return " ".join(_WORDS.findall(text.casefold()))


def _has(response: str, text: str) -> bool:
    return bool(_plain(text)) and f" {_plain(text)} " in f" {_plain(response)} "


GRADER = Grader("multiple_choice", MultipleChoiceSettings, grade)
