"""The teacher of on-policy distillation: an engine that scores what the student sampled, by SGLang's /generate.

Its scores are logged with the step, so that a step that is trained again reads them instead of asking again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from postroad.messages import Sample

logger = logging.getLogger(__name__)

CONCURRENCY = 32
ATTEMPTS = 5
TIMEOUT_S = 120.0
FIRST_WAIT_S = 0.5

Groups = Sequence[Sequence[Sample]]


class TeacherError(RuntimeError):
    """The teacher does not answer, or not to what it was asked."""


class Teacher:
    def __init__(self, url: str, temperature: float, key: str = "") -> None:
        self._url, self._temperature = f"{url.rstrip('/')}/generate", temperature
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def scored(self, groups: Groups) -> list[list[Sample]]:
        """The groups with the teacher's log-probability of every token. Raises TeacherError."""
        limit = asyncio.Semaphore(CONCURRENCY)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, headers=self._headers) as client:

            async def one(sample: Sample) -> Sample:
                if sample.teacher_log_probabilities is not None:
                    return sample
                async with limit:
                    return await self._score(client, sample)

            return [list(await asyncio.gather(*map(one, members))) for members in groups]

    async def _score(self, client: httpx.AsyncClient, sample: Sample) -> Sample:
        tokens = sample.trajectory.tokens.tolist()
        parameters = {"max_new_tokens": 0, "temperature": self._temperature}
        body = {"input_ids": tokens, "sampling_params": parameters, "return_logprob": True, "logprob_start_len": 0}
        answer = await self._ask(client, body)
        try:
            values = answer["meta_info"]["input_token_logprobs"]
            scored = [int(token) for _, token, *_ in values]
            score = np.array([0.0 if value is None else value for value, *_ in values], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise TeacherError(f"{self._url} gave no input_token_logprobs for {sample.id}: {error!r}") from error
        if scored != tokens:
            raise TeacherError(
                f"{self._url} scored {len(scored)} other tokens than the {len(tokens)} of {sample.id}: teacher and student "
                "must share their vocabulary"
            )
        score[~sample.trajectory.loss_mask.astype(bool)] = 0
        return sample.model_copy(update={"teacher_log_probabilities": score})

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                logger.warning("teacher %s failed (%s), attempt %d of %d", self._url, failure, attempt + 1, ATTEMPTS)
                await asyncio.sleep(FIRST_WAIT_S * 2**attempt)
            try:
                response = await client.post(self._url, json=body)
                if response.status_code == 200:
                    return response.json()
                failure = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code < 500 and response.status_code != 429:
                    break
            except (httpx.HTTPError, ValueError) as error:
                failure = repr(error)
        raise TeacherError(f"the teacher {self._url} failed: {failure}; see trainer.algorithm.teacher_url")


def packed(groups: Groups) -> np.ndarray | None:
    """float32: the scores of all trained tokens one behind the other, for the step log; None where nothing was scored."""
    scores = [
        sample.teacher_log_probabilities[sample.trajectory.loss_mask.astype(bool)]
        for members in groups
        for sample in members
        if sample.teacher_log_probabilities is not None
    ]
    return np.concatenate(scores).astype(np.float32) if scores else None


def unpacked(samples: Sequence[Sample], scores: np.ndarray | None) -> list[Sample]:
    """The samples with the scores that `packed` put into the log."""
    if scores is None:
        return list(samples)
    done, start = [], 0
    for sample in samples:
        mask = sample.trajectory.loss_mask.astype(bool)
        score = np.zeros(len(mask), np.float32)
        score[mask] = scores[start : start + int(mask.sum())]
        start += int(mask.sum())
        done.append(sample.model_copy(update={"teacher_log_probabilities": score}))
    return done
