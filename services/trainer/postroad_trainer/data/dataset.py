"""A data set in memory: rows that were checked once, and a report of those that were left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


class DataError(ValueError):
    """The data set can't be used; the message names the row or the setting, and the remedy."""


@dataclass(frozen=True)
class Row:
    """One prompt: chat messages, the expected answer, and what else the grader needs. `id` names it for ever."""

    id: str
    prompt: Messages
    label: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Rows that were left out: unreadable or too long, there already, held out for an evaluation."""

    broken: list[str] = field(default_factory=list)
    duplicates: int = 0
    excluded: int = 0

    def __str__(self) -> str:
        return f"{len(self.broken)} broken, {self.duplicates} duplicates, {self.excluded} held out"


@dataclass(frozen=True)
class Dataset:
    rows: Sequence[Row]
    report: Report

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]

    def prompts(self, count: int | None = None) -> set[str]:
        """The keys of the first `count` prompts (of all): what `open_dataset(exclude=...)` takes."""
        return {prompt_key(row.prompt) for row in self.rows[:count]}


def prompt_key(prompt: Messages) -> str:
    """Two prompts with the same key ask the same question; system messages are not part of it."""
    return canonical([message for message in prompt if message.get("role") != "system"])


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
