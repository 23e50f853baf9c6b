"""A grader's process: reads requests from its standard input, grades, answers. It may be killed at any moment.

`python -m postroad_reward.worker PARENT_PID MEMORY_BYTES`. What graders print goes to standard error.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import resource
import sys
import traceback
from collections.abc import Awaitable
from typing import Any, BinaryIO

from postroad.supervisor.processes import ORPHANED, die_with_parent
from postroad_reward import wire
from postroad_reward.errors import GraderSettingsError, UnknownGrader
from postroad_reward.graders import Attempt, check, checked_grade, find


def main() -> None:
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # the service died before the kernel knew
        sys.exit(ORPHANED)
    memory = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = _claim_pipes()
    with asyncio.Runner() as runner:
        while (request := wire.read(requests)) is not None:
            answers.write(wire.pack(answer(request, runner)))
            answers.flush()


def answer(request: dict[str, Any], runner: asyncio.Runner) -> dict[str, Any]:
    """The grade, or the error with its traceback."""
    try:
        return _work(request, runner)
    except (UnknownGrader, GraderSettingsError) as error:
        return {"error": str(error), "traceback": traceback.format_exc(), "settings": True}
    except Exception as error:  # noqa: BLE001  a grader may raise anything; the service raises it again
        return {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}


def _work(request: dict[str, Any], runner: asyncio.Runner) -> dict[str, Any]:
    grader, settings = find(request["grader"]), check(request["grader"], request["settings"])
    if request["kind"] == "prepare":
        grader.prepare(settings)
        return {}
    assert grader.grade is not None
    attempts = [Attempt(**attempt) for attempt in request["attempts"]]
    if grader.group(settings):
        results = _finish(grader.grade(attempts, settings), runner)
    else:
        results = [_finish(grader.grade(attempt, settings), runner) for attempt in attempts]
    return {"grades": [vars(checked_grade(result)) for result in results]}


def _finish(result: Any, runner: asyncio.Runner) -> Any:
    return runner.run(_await(result)) if inspect.isawaitable(result) else result


async def _await(result: Awaitable[Any]) -> Any:
    return await result


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the service, out of reach of what a grader prints, reads or starts."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


if __name__ == "__main__":
    main()
