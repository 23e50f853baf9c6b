"""Graders behind HTTP: `judge`, a model at any OpenAI-compatible address, and `remote`, any service of the user's.

What they can't be reached for is `judge_unavailable`, an answer that can't be read is `invalid_answer`: both are retried
and end in DEAD, never as a reward. The key is read from the environment variable that `key_variable` names.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import re
from statistics import fmean
from typing import Any

import httpx
from pydantic import Field, field_validator, model_validator

from postroad_reward.errors import InvalidAnswer, JudgeUnavailable
from postroad_reward.graders.base import Attempt, Context, Grade, Grader, Settings
from postroad_reward.graders.function import as_grade

logger = logging.getLogger(__name__)

ATTEMPTS, BACKOFF_S = 3, 0.5
PASSING = (408, 409, 429)
RUBRIC = """\
Grade the response to the task. Task:
{prompt}

Reference answer: {label}

Response:
{response}

Think about it, then end with one line: SCORE: a number from {lowest} (worthless) to {highest} (fully correct)."""


class AddressSettings(Settings):
    url: str = Field(pattern=r"^https?://", description="Address; for `judge` up to and with /v1.")
    key_variable: str | None = Field(None, description="Environment variable with the bearer token.")
    timeout_s: float = Field(20.0, gt=0, description="Seconds that one request may take.")


class JudgeSettings(AddressSettings):
    model: str
    rubric: str = Field(RUBRIC, description="Template with {prompt}, {response}, {label}, {lowest} and {highest}.")
    votes: int = Field(1, ge=1, le=32, description="Independent verdicts, of which the mean counts.")
    pattern: str = Field(
        r"(?i)SCORE\s*:\s*\**\s*(-?\d+(?:\.\d+)?)", description="Finds the score; the last match counts."
    )
    lowest: float = Field(0.0, description="The score that becomes a reward of 0.")
    highest: float = Field(10.0, description="The score that becomes a reward of 1.")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(1024, ge=1)

    @field_validator("rubric")
    @classmethod
    def _fills(cls, value: str) -> str:
        try:
            value.format(prompt="", response="", label="", lowest=0, highest=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"not a template of prompt, response, label, lowest and highest: {error!r}") from error
        return value

    @model_validator(mode="after")
    def _ordered(self) -> JudgeSettings:
        if self.lowest >= self.highest or re.compile(self.pattern).groups != 1:
            raise ValueError("lowest must be below highest, and pattern must have one group")
        return self


async def judge(attempts: list[Attempt], settings: JudgeSettings, context: Context) -> list[Grade]:
    """The mean of the votes' scores, from 0 to 1 (LLM as a judge, Zheng et al. 2023)."""
    return [await _judged(attempt, settings, context) for attempt in attempts]


async def _judged(attempt: Attempt, settings: JudgeSettings, context: Context) -> Grade:
    async with asyncio.TaskGroup() as group:
        voting = [group.create_task(_vote(attempt, settings, context)) for _ in range(settings.votes)]
    votes = [vote.result() for vote in voting]
    return Grade(fmean(votes), {"votes": len(votes), "spread": max(votes) - min(votes)})


async def _vote(attempt: Attempt, settings: JudgeSettings, context: Context) -> float:
    text = settings.rubric.format(
        prompt="\n".join(str(message.get("content")) for message in attempt.prompt), response=attempt.response,
        label=attempt.label, lowest=f"{settings.lowest:g}", highest=f"{settings.highest:g}",
    )  # fmt: skip
    body = {
        "model": settings.model, "messages": [{"role": "user", "content": text}], "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
    }  # fmt: skip
    for _ in range(ATTEMPTS):
        reply = await _post(context.http, f"{settings.url.rstrip('/')}/chat/completions", body, settings)
        said = _content(reply)
        scores = re.findall(settings.pattern, said)
        if scores and settings.lowest <= float(scores[-1]) <= settings.highest:
            return (float(scores[-1]) - settings.lowest) / (settings.highest - settings.lowest)
        logger.info("judge %s gave no score that can be read: %.200r", settings.model, said)
    raise InvalidAnswer(f"judge {settings.model!r} gave no score in {ATTEMPTS} answers; the last was {said[-200:]!r}")


def _content(reply: Any) -> str:
    try:
        return str(reply["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise InvalidAnswer(f"the judge's reply is no chat completion: {str(reply)[:200]}") from error


async def remote(attempts: list[Attempt], settings: AddressSettings, context: Context) -> list[Grade]:
    """POST of {prompt, response, label, metadata}; the reply is a number, or an object with `reward` and further numbers."""
    return [await _asked(attempt, settings, context) for attempt in attempts]


async def _asked(attempt: Attempt, settings: AddressSettings, context: Context) -> Grade:
    body = {
        "prompt": attempt.prompt,
        "response": attempt.response,
        "label": attempt.label,
        "metadata": attempt.metadata,
    }
    reply = await _post(context.http, settings.url, body, settings)
    values = [reply.get("reward"), *reply.values()] if isinstance(reply, dict) else [reply]
    if not isinstance(values[0], int | float) or isinstance(values[0], bool) or not math.isfinite(values[0]):
        raise InvalidAnswer(f"{settings.url} answered {str(reply)[:200]!r}, not a number or an object with a reward")
    return as_grade(reply)


async def _post(client: httpx.AsyncClient, url: str, body: dict[str, Any], settings: AddressSettings) -> Any:
    """The JSON of the reply; what may pass is tried again, with growing pauses of random length."""
    key = os.environ.get(settings.key_variable) if settings.key_variable else None
    if settings.key_variable and not key:
        raise ValueError(f"the environment has no {settings.key_variable}, which key_variable names")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for attempt in range(ATTEMPTS):
        try:
            reply = await client.post(url, json=body, headers=headers, timeout=settings.timeout_s)
            if reply.status_code not in PASSING and reply.status_code < 500:
                break
            fault = f"HTTP {reply.status_code}"
        except httpx.TransportError as error:
            fault = f"{type(error).__name__} {error}".strip()
        logger.info("%s: %s (attempt %d of %d)", url, fault, attempt + 1, ATTEMPTS)
        await asyncio.sleep(BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))
    else:
        raise JudgeUnavailable(f"{url} failed {ATTEMPTS} times; the last: {fault}")
    if reply.is_error:
        raise ValueError(f"{url} refuses the request with HTTP {reply.status_code}: {reply.text[:300]}")
    try:
        return reply.json()
    except ValueError as error:
        raise InvalidAnswer(f"{url} answered no JSON: {reply.text[:200]!r}") from error


JUDGE = Grader("judge", JudgeSettings, run=judge)
REMOTE = Grader("remote", AddressSettings, run=remote)
