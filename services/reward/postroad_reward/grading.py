"""One grading, wherever it runs: in a grader's process, or here where it waits for a sandbox, a judge or other graders."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from postroad.config.recipe import RewardSection
from postroad_reward.errors import (
    GraderFailed,
    GraderSettingsError,
    GraderTimeout,
    InvalidAnswer,
    InvalidReward,
    JudgeUnavailable,
    UnknownGrader,
)
from postroad_reward.graders import Attempt, Grade, Grader, Settings, check, checked_grade, find, parts_of
from postroad_reward.pool import Pool
from postroad_reward.sandbox import Job, Limits, Result, Sandbox, SandboxLost, SandboxUnavailable

_TYPED = (GraderTimeout, GraderFailed, InvalidAnswer, InvalidReward, JudgeUnavailable, SandboxLost)


class Grading:
    """The graders' context (graders.base.Context). `limits` bound how many gradings of a grader run side by side."""

    def __init__(self, reward: RewardSection) -> None:
        self.reward = reward
        self._parts = list(parts_of(reward.grader, dict(reward.settings)))
        self.pool = Pool(limit=reward.concurrency, prepare=[part for part in self._parts if find(part[0]).grade])
        self.sandbox = sandbox_of(reward, reward.concurrency)
        self.http = httpx.AsyncClient(limits=httpx.Limits(max_connections=256))
        self._rooms = {name: asyncio.Semaphore(limit) for name, limit in reward.limits.items()}

    async def start(self) -> None:
        """Raises GraderFailed where the recipe's grader can't be prepared, SandboxUnavailable where it needs one in vain."""
        if any(find(name).sandbox for name, _ in self._parts):
            await self.sandbox.start()
        await self.pool.start()

    async def close(self) -> None:
        await self.pool.close()
        await self.sandbox.close()
        await self.http.aclose()

    async def run(self, job: Job) -> Result:
        return await self.sandbox.run(job)

    async def grade(self, grader: str, settings: dict[str, Any], attempts: list[Attempt]) -> list[Grade]:
        """A grade for each attempt. Raises one of the typed failures (_TYPED), never anything else of a grader's."""
        found, valid = checked(grader, settings)
        room = self._rooms.get(grader)
        if room is None:
            return await self._grade(found, valid, settings, attempts)
        async with room:
            return await self._grade(found, valid, settings, attempts)

    async def _grade(
        self, grader: Grader[Any], valid: Settings, settings: dict[str, Any], attempts: list[Attempt]
    ) -> list[Grade]:
        deadline_s = self.reward.deadline_s
        if grader.run is None:
            return await self.pool.grade(grader.name, settings, attempts, deadline_s)
        try:
            async with asyncio.timeout(deadline_s):
                grades = [checked_grade(grade) for grade in await grader.run(attempts, valid, self)]
        except TimeoutError as error:
            raise GraderTimeout(f"the grader {grader.name!r} did not answer within {deadline_s:g} s") from error
        except Exception as error:
            raise _typed(error) from error
        return grades


def sandbox_of(reward: RewardSection, size: int) -> Sandbox:
    section = reward.sandbox
    limits = Limits(**section.model_dump(include=set(Limits.model_fields)))
    return Sandbox(limits, size=size, packages=tuple(section.packages), imports=tuple(section.imports))


def checked(grader: str, settings: dict[str, Any]) -> tuple[Grader[Any], Settings]:
    """Raises GraderFailed, marked as a matter of settings."""
    try:
        return find(grader), check(grader, settings)
    except (UnknownGrader, GraderSettingsError) as error:
        raise GraderFailed(str(error), settings=True) from error


def _typed(error: BaseException) -> Exception:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, SandboxUnavailable):
        return SandboxLost(str(error))
    if isinstance(error, _TYPED):
        return error
    return GraderFailed(f"{type(error).__name__}: {error}"[:2000])
