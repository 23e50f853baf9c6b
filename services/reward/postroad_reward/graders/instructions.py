"""`instructions`: 1 where the response follows all verifiable instructions of the row (IFEval, Zhou et al. 2023, strict).

The row's metadata hold `instruction_id_list` and `kwargs`, a mapping per instruction (one mapping serves all; a short list
goes on with its last; None values are left out). Words and sentences are found by regular expressions, not by NLTK.
`language:response_language` and instructions that are not here are a failure of the grader, never a reward of 0.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from typing import Any

from pydantic import Field

from postroad_reward.graders.answers import without_fence
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings


class InstructionsSettings(Settings):
    partial: bool = Field(
        False, description="The share of the instructions that are followed, rather than all or none."
    )


def grade(attempt: Attempt, settings: InstructionsSettings) -> Grade:
    names = attempt.metadata.get("instruction_id_list")
    if not names:
        raise ValueError("the instructions grader needs metadata.instruction_id_list")
    given = attempt.metadata.get("kwargs") or {}
    given = given if isinstance(given, list) else [given]
    rows = [given[min(place, len(given) - 1)] or {} for place in range(len(names))]
    followed = [follows(attempt.response, name, row) for name, row in zip(names, rows, strict=True)]
    share = sum(followed) / len(followed)
    return Grade(share if settings.partial else float(share == 1), {"followed": share})


def follows(response: str, name: str, keywords: dict[str, Any]) -> bool:
    """Raises ValueError for an unknown instruction and for wrong keywords."""
    if name not in INSTRUCTIONS:
        near = difflib.get_close_matches(name, INSTRUCTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(INSTRUCTIONS))}"
        raise ValueError(f"there is no instruction {name!r}: {hint}")
    given = {key: value for key, value in keywords.items() if value is not None}
    try:
        return bool(response.strip()) and bool(INSTRUCTIONS[name](response, **given))
    except TypeError as error:
        raise ValueError(f"instruction {name!r} can't be checked with {given}: {error}") from error


def _compare(count: int, number: int, relation: str) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"a relation is 'at least' or 'less than', not {relation!r}")
    return count >= number if relation == "at least" else count < number


def _found(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_found(keyword, text), frequency, relation)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_frequency, let_relation)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(_found(r"\w+", text), num_words, relation)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(
        len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text) if part.strip()]), num_sentences, relation
    )


def _capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in re.findall(r"[\w'-]+", text)), capital_frequency, capital_relation)


def _parts(text: str, separator: str) -> list[str] | None:
    """The parts between separators; an empty one at an end is none, one in between is a fault."""
    parts = [part.strip() for part in re.split(separator, text)]
    inner = parts[1:-1]
    return None if not all(inner) else [part for part in parts if part]


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    return len(_parts(text, r"\s?\*\*\*\s?") or ()) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = re.split(r"\n\n", text)
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if not 1 <= nth_paragraph <= filled or not (paragraph := paragraphs[nth_paragraph - 1].strip()):
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'\""))[0].lower()
    return filled == num_paragraphs and word == first_word.lower()


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) - 1 >= num_sections


def _highlights(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def _postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(postscript_marker, rf"\s*{re.escape(postscript_marker.lower())}.*$")
    return bool(re.search(pattern, text.lower(), re.MULTILINE))


def _json(text: str) -> bool:
    try:
        json.loads(without_fence(text))
    except ValueError:
        return False
    return True


def _two_responses(text: str) -> bool:
    return len(parts := _parts(text, r"\*{6}") or []) == 2 and parts[0] != parts[1]


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(_found(word, text) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(_found(rf"\b{w}\b", text) for w in forbidden_words)
    ),
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _words,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE))
        == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(
        f"My answer is {a}." in text for a in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda text: any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": _ends,
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": _capitals,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}

GRADER = Grader("instructions", InstructionsSettings, grade)
