"""From raw values to checked rows: what is broken is named, what is there twice is kept once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from postroad.config.recipe import DataSection
from postroad_trainer.data.dataset import DataError, Dataset, Messages, Report, Row, canonical, prompt_key

LISTED = 10


@dataclass(frozen=True)
class Raw:
    """One row of a source: its id, its place for people (`data.jsonl line 7`), and its value or why there is none."""

    id: str
    place: str
    value: Any = None
    fault: str | None = None


@dataclass(frozen=True)
class Columns:
    """Under which names a source keeps what. `label_required` says that a row without a label is broken."""

    prompt: str = "prompt"
    label: str = "label"
    metadata: str = "metadata"
    label_required: bool = False


class BrokenRow(ValueError):
    """A row that can't be used, in a sentence."""


def collect(
    raws: Iterable[Raw], columns: Columns, section: DataSection, exclude: Iterable[str],
    count_tokens: Callable[[Messages], int] | None,
) -> Dataset:  # fmt: skip
    """The usable rows in their order. Raises DataError where more than `max_broken_rows` are broken, or none is left."""
    rows, report, seen, held_out = [], Report(), set(), set(exclude)
    for raw in raws:
        try:
            row = _row(raw, columns, section)
            _check_length(row.prompt, section, count_tokens)
        except BrokenRow as error:
            report.broken.append(f"{raw.place}: {error}")
            continue
        key = canonical(row.prompt)
        if key in seen:
            report.duplicates += 1
        elif prompt_key(row.prompt) in held_out:
            report.excluded += 1
        else:
            rows.append(row)
        seen.add(key)
    _check_broken(report.broken, section.max_broken_rows)
    if not rows:
        raise DataError(f"{section.path or section.task} has no usable row ({report})")
    return Dataset(rows, report)


def _check_broken(broken: list[str], allowed: int) -> None:
    if len(broken) <= allowed:
        return
    listed = "\n".join(f"  {line}" for line in broken[:LISTED])
    more = f"\n  … and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    raise DataError(
        f"{len(broken)} broken rows, data.max_broken_rows allows {allowed}: mend them or raise it\n{listed}{more}"
    )


def _row(raw: Raw, columns: Columns, section: DataSection) -> Row:
    if raw.fault is not None:
        raise BrokenRow(raw.fault)
    if not isinstance(raw.value, Mapping):
        raise BrokenRow(f"a row must be a mapping of columns, not {_named(raw.value)}")
    if columns.prompt not in raw.value:
        raise BrokenRow(f"the key {columns.prompt!r} is missing; there are {', '.join(map(str, raw.value)) or 'none'}")
    label = raw.value.get(columns.label)
    if columns.label_required and label is None:
        raise BrokenRow(f"the key {columns.label!r} is missing or null")
    metadata = raw.value.get(columns.metadata)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise BrokenRow(f"{columns.metadata!r} must be a mapping, not {_named(metadata)}")
    prompt = _messages(raw.value[columns.prompt], columns.prompt, section.system)
    return Row(raw.id, prompt, clean(label, columns.label), clean(metadata, columns.metadata))


def _messages(value: Any, name: str, system: str | None) -> Messages:
    """Chat messages; text is one user message. The section's system message does not replace the row's own."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise BrokenRow(f"{name!r} must be text or a list of chat messages, not {_named(value)}")
    cleaned: Messages = []
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str | list):
            raise BrokenRow(f"a message of {name!r} needs a role and a content, not {_named(dict(message))}")
        present = {key: part for key, part in message.items() if part is not None}  # parquet fills absent keys
        cleaned.append(clean(present, name))
    if not any(_said(message) for message in cleaned if message["role"] != "system"):
        raise BrokenRow(f"{name!r} is empty")
    if system is not None and cleaned[0]["role"] != "system":
        cleaned.insert(0, {"role": "system", "content": system})
    return cleaned


def _said(message: dict[str, Any]) -> bool:
    content = message["content"]
    return bool(content.strip() if isinstance(content, str) else content)


def _check_length(prompt: Messages, section: DataSection, count_tokens: Callable[[Messages], int] | None) -> None:
    if section.max_prompt_tokens is None:
        return
    if count_tokens is None:
        raise DataError("data.max_prompt_tokens needs the model's tokenizer, which is not at hand here")
    tokens = count_tokens(prompt)
    if tokens > section.max_prompt_tokens:
        raise BrokenRow(f"the prompt has {tokens} tokens, data.max_prompt_tokens allows {section.max_prompt_tokens}")


def clean(value: Any, where: str) -> Any:
    """`value` of plain types that JSON and msgpack carry. Raises BrokenRow naming the place of what they don't."""
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, numbers.Integral):
        if not -(2**63) <= value < 2**64:
            raise BrokenRow(f"{where}: an integer of more than 64 bits can't travel; write it as text")
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise BrokenRow(f"{where}: {value} is not a finite number")
        return float(value)
    if isinstance(value, Mapping):
        return {_key(key, where): clean(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [clean(part, f"{where}[{index}]") for index, part in enumerate(value)]
    if hasattr(value, "tolist"):
        return clean(value.tolist(), where)
    raise BrokenRow(f"{where}: a {type(value).__name__} can't travel; write it as text or numbers")


def _key(key: Any, where: str) -> Any:
    if not isinstance(key, str | int):
        raise BrokenRow(f"{where}: the key {key!r} must be text")
    return key


def _named(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
