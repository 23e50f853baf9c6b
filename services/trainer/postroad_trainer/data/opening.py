"""From the recipe's data section to a data set."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from postroad.config.recipe import DataSection
from postroad.reasoning import import_reasoning_gym
from postroad_trainer.data.dataset import DataError, Dataset, Messages, Row
from postroad_trainer.data.files import read_rows
from postroad_trainer.data.rows import Columns, Raw, clean, collect

logger = logging.getLogger(__name__)

DEFAULT_LABEL = "label"


def open_dataset(
    section: DataSection, *, exclude: Iterable[str] = (), count_tokens: Callable[[Messages], int] | None = None
) -> Dataset:
    """The rows of `section`, the same at every call. `exclude` are prompt keys (Dataset.prompts) that are held out;
    `count_tokens` gives the length of a rendered prompt, for data.max_prompt_tokens. Raises DataError."""
    if section.kind == "reasoning_gym":
        data = collect(_reasoning_gym(section), Columns(), section, exclude, count_tokens)
    else:
        columns = Columns(section.prompt_key, section.label_key, section.metadata_key)
        if section.kind == "file":
            raws = read_rows(Path(section.path or ""), (columns.prompt, columns.label, columns.metadata))
        else:
            raws = list(_class_rows(section))
        required = _label_required(section.label_key, raws)
        columns = Columns(columns.prompt, columns.label, columns.metadata, required)
        data = collect(raws, columns, section, exclude, count_tokens)
    logger.info("%s: %d rows (%s)", section.path or section.task, len(data), data.report)
    for line in data.report.broken[:10]:
        logger.warning("broken row skipped: %s", line)
    return data


def _label_required(key: str, raws: Iterable[Raw]) -> bool:
    """A data set may have no labels at all; but not where the recipe names their column, nor for some rows only."""
    return key != DEFAULT_LABEL or any(
        isinstance(raw.value, Mapping) and raw.value.get(key) is not None for raw in raws
    )


def _reasoning_gym(section: DataSection) -> Iterator[Raw]:
    """Generated rows. Their metadata hold the entry, and what the grader needs to build the data set again."""
    try:
        reasoning_gym = import_reasoning_gym()
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError("data.kind reasoning_gym needs its package: pip install reasoning-gym") from error
    task = str(section.task)
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1)
        raise DataError(f"reasoning-gym has no data set {task!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    try:
        entries = reasoning_gym.create_dataset(task, size=section.size, seed=section.seed, **section.settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"data.settings {section.settings} do not suit reasoning-gym's {task}: {error}") from error
    _check_travels(task, entries)
    source = {"task": task, "settings": section.settings, "seed": section.seed, "size": section.size}
    for index in range(section.size):
        entry = entries[index]
        row = {"prompt": entry["question"], "label": entry["answer"], "metadata": {**source, "entry": entry}}
        yield Raw(f"{task}-{section.seed}-{index}", f"{task} entry {index}", row)


def _check_travels(task: str, entries: Any) -> None:
    """A few data sets score by Python types, such as tuples, that messages don't keep: they would grade all as wrong."""
    entry = entries[0]
    answer = entry["answer"]
    if entries.score_answer(answer, entry) != entries.score_answer(answer, clean(entry, task)):
        raise DataError(f"reasoning-gym's {task} scores by Python types that can't travel: choose another data.task")


def _class_rows(section: DataSection) -> Iterator[Raw]:
    """Rows of the user's class (or function): called with data.settings, it gives mappings or Rows."""
    path = str(section.path)
    module, _, name = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)(**section.settings)
        rows = iter(made)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"data.path {path} can't be used: {error}") from error
    except TypeError as error:
        raise DataError(f"data.path {path} does not give rows for data.settings {section.settings}: {error}") from error
    for index, row in enumerate(rows):
        place = f"{path} row {index}"
        if isinstance(row, Row):
            value: Any = {
                section.prompt_key: row.prompt,
                section.label_key: row.label,
                section.metadata_key: row.metadata,
            }
            yield Raw(row.id, place, value)
        else:
            yield Raw(str(index), place, row)
