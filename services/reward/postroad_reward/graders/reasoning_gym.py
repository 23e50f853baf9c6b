"""`reasoning_gym`: the score that the row's own data set gives (reasoning-gym, Stojanovski et al. 2025).

The row's metadata say which data set that is and carry its entry: `entry`, and `task`, `settings`, `seed` and `size`,
with which the data set is built again here (some score by their settings or seed). postroad_trainer.data writes them.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from postroad.reasoning import import_reasoning_gym
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings

_NUMBER = re.compile(r"-?\d+")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SOLVED = 0.99


class ReasoningGymSettings(Settings):
    task: str | None = Field(None, description="Name of the data set; the row's own by itself.")
    settings: dict[str, Any] | None = Field(None, description="Its keyword arguments; the row's own by themselves.")
    answer: Literal["last_number", "all", "tag"] = Field(
        "tag", description="What is scored: the last integer, the whole response, or what is in the last <answer> tag."
    )
    binary: bool = Field(True, description="1 where the score is above 0.99, else 0; off: the score itself.")


def grade(attempt: Attempt, settings: ReasoningGymSettings) -> Grade:
    entry = attempt.metadata.get("entry")
    if not isinstance(entry, dict) or "answer" not in entry:
        raise ValueError("the reasoning_gym grader needs metadata.entry: is data.kind reasoning_gym?")
    answer = extract(attempt.response, settings.answer)
    if answer is None:
        return Grade(0.0, {"score": 0.0, "answered": 0.0})
    score = float(_data_set_of(attempt.metadata, entry, settings).score_answer(answer, entry))
    return Grade(float(score > SOLVED) if settings.binary else score, {"score": score, "answered": 1.0})


def extract(response: str, answer: Literal["last_number", "all", "tag"]) -> str | None:
    """The part of the response that is scored; None where it has none."""
    if answer == "all":
        return response.strip()
    found = (_NUMBER if answer == "last_number" else _TAG).findall(response)
    return str(found[-1]).strip() if found else None


def _data_set_of(metadata: dict[str, Any], entry: dict[str, Any], settings: ReasoningGymSettings) -> Any:
    task = settings.task or metadata.get("task") or (entry.get("metadata") or {}).get("source_dataset")
    if not task:
        raise ValueError("the reasoning_gym grader needs metadata.task or its setting task")
    keywords = metadata.get("settings") or {} if settings.settings is None else settings.settings
    size, seed = metadata.get("size", 1), metadata.get("seed", 0)
    return _data_set(str(task), json.dumps({**keywords, "size": size, "seed": seed}, sort_keys=True))


@lru_cache(maxsize=32)
def _data_set(task: str, keywords: str) -> Any:
    return import_reasoning_gym().create_dataset(task, **json.loads(keywords))


GRADER = Grader("reasoning_gym", ReasoningGymSettings, grade, prepare=lambda settings: import_reasoning_gym())
