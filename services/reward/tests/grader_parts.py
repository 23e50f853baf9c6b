"""One answer given to one grader, as the service gives it."""

from __future__ import annotations

import asyncio
import inspect

from postroad_reward.graders import Attempt, Grade, check, checked_grade, find


def grade(name: str, response: str, label=None, settings=None, metadata=None, tokens=0) -> Grade:
    attempt = Attempt([{"role": "user", "content": "?"}], response, label, metadata or {}, tokens)
    result = find(name).grade(attempt, check(name, settings or {}))

    async def finish():
        return await result

    return checked_grade(asyncio.run(finish()) if inspect.isawaitable(result) else result)
