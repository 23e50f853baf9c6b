"""How a session's tokens differ from the chat template's own rendering of its messages.

Both are cut at special tokens and compared piece by piece. `assistant_text` is the model's own way to write (its
tokens are kept, whatever the template would make of its message); the others are a template or a junction at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from postroad_router.template import Vocabulary

Kind = Literal["special_token_count", "special_token_type", "assistant_text", "non_assistant_text"]
KINDS: tuple[Kind, ...] = ("special_token_count", "special_token_type", "assistant_text", "non_assistant_text")


@dataclass(frozen=True)
class Drift:
    """The first words that differ within piece number `piece`; -1 where the pieces do not match up at all."""

    kind: Kind
    piece: int
    expected: str
    actual: str


def find_drift(
    tokens: np.ndarray, generated: np.ndarray, canonical: Sequence[int], vocabulary: Vocabulary
) -> list[Drift]:
    """`tokens` [T] against the `canonical` rendering; `generated` [T] says which of them the model wrote."""
    actual = _pieces(tokens.tolist(), vocabulary)
    expected = _pieces(list(canonical), vocabulary)
    if len(actual) != len(expected):
        return [Drift("special_token_count", -1, f"{len(expected)} pieces", f"{len(actual)} pieces")]
    found: list[Drift] = []
    for number, ((ours, start, end), (theirs, *_)) in enumerate(zip(actual, expected, strict=True)):
        if ours == theirs:
            continue
        special = any(token in vocabulary.special for token in (*ours[:1], *theirs[:1]))
        words, wanted = vocabulary.decode(ours, special=True), vocabulary.decode(theirs, special=True)
        if special:
            found.append(Drift("special_token_type", number, wanted, words))
        elif words != wanted:
            kind: Kind = "assistant_text" if generated[start:end].any() else "non_assistant_text"
            found.append(Drift(kind, number, *_first_difference(wanted, words)))
    return found


def _pieces(tokens: list[int], vocabulary: Vocabulary) -> list[tuple[list[int], int, int]]:
    """Each special token, and the tokens before, between and after them; without the end that closes the last turn."""
    end = len(tokens)
    while end and (tokens[end - 1] in vocabulary.special or not vocabulary.decode([tokens[end - 1]]).strip()):
        end -= 1
    pieces: list[tuple[list[int], int, int]] = []
    start = 0
    for place, token in enumerate(tokens[:end]):
        if token in vocabulary.special:
            pieces += [(tokens[start:place], start, place), ([token], place, place + 1)]
            start = place + 1
    return [*pieces, (tokens[start:end], start, end)]


def _first_difference(expected: str, actual: str, width: int = 40) -> tuple[str, str]:
    place = next((n for n, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]), None)
    start = max((min(len(expected), len(actual)) if place is None else place) - width // 2, 0)
    return expected[start : start + width], actual[start : start + width]
