"""`code`: programs against tests, in the sandbox. 1 where all tests pass, else 0; with `partial` the share that does.

The label (or metadata.tests; JSON text or the value itself) says the tests, in one of three forms:
  {"inputs": [...], "outputs": [...]}                 standard input and output (APPS, Hendrycks et al. 2021)
  {"fn_name": "f", "inputs": [[1, 2]], "outputs": [3]}   calls; a method of a class Solution too
  ["assert f(1) == 2", ...]                            statements after the program (MBPP, Austin et al. 2021)
Outputs are compared line by line without white space at the ends, numbers by value. Each test is a job of its own, and
what is expected never enters the sandbox except in assertions, which the program could tamper with.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from pydantic import Field

from postroad_reward.graders.answers import after_thinking
from postroad_reward.graders.base import Attempt, Context, Grade, Grader, Settings
from postroad_reward.sandbox.models import Job, Result

_BLOCK = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)```", re.DOTALL)
_SIDE_BY_SIDE = 4
_CALL = """

import json as _json, sys as _sys
_target = globals().get({name!r}) or getattr(Solution(), {name!r})
_value = _target(*_json.loads(_sys.stdin.read()))
print({mark!r} + _json.dumps(_value))
"""


class CodeSettings(Settings):
    partial: bool = Field(False, description="The share of the tests that pass, rather than all or none.")
    test_deadline_s: float = Field(5.0, gt=0, description="Seconds that one test may take.")


@dataclass(frozen=True)
class Test:
    job: Job
    expected: Any
    kind: str
    mark: str = ""

    def passed(self, result: Result) -> bool:
        if result.status != "ok":
            return False
        if self.kind == "output":
            return same_output(result.stdout, str(self.expected))
        last = result.stdout.rstrip("\n").rpartition("\n")[2]
        if not last.startswith(self.mark):
            return False
        return self.kind == "assert" or same_value(_loads(last.removeprefix(self.mark)), self.expected)


async def run(attempts: list[Attempt], settings: CodeSettings, context: Context) -> list[Grade]:
    return [await grade(attempt, settings, context) for attempt in attempts]


async def grade(attempt: Attempt, settings: CodeSettings, context: Context) -> Grade:
    tests = tests_of(attempt, settings.test_deadline_s)
    passed: list[bool] = []
    for first in range(0, len(tests), _SIDE_BY_SIDE):
        some = tests[first : first + _SIDE_BY_SIDE]
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(context.run(test.job)) for test in some]
        passed += [test.passed(task.result()) for test, task in zip(some, running, strict=True)]
        if not settings.partial and not all(passed):
            break
    share = sum(passed) / len(tests)
    verdicts = {f"test_{number}": float(verdict) for number, verdict in enumerate(passed)}
    return Grade(share if settings.partial else float(share == 1), {"passed": share, "tests": len(tests), **verdicts})


def program_of(response: str) -> str:
    """The last fenced block after </think>; the whole response where there is none."""
    answer = after_thinking(response)
    blocks = _BLOCK.findall(answer)
    return str(blocks[-1]) if blocks else answer


def tests_of(attempt: Attempt, deadline_s: float) -> list[Test]:
    """Raises ValueError where label and metadata hold no tests."""
    given = attempt.label if attempt.label is not None else attempt.metadata.get("tests")
    tests = _loads(given) if isinstance(given, str) else given
    program = program_of(attempt.response)
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        mark = secrets.token_hex(8)
        return [
            Test(Job(f"{program}\n{test}\nprint({mark!r})", deadline_s=deadline_s), None, "assert", mark)
            for test in tests
        ]
    if (
        not isinstance(tests, dict)
        or not tests.get("inputs")
        or len(tests["inputs"]) != len(tests.get("outputs") or ())
    ):
        raise ValueError(
            f"the code grader can't read its tests from {str(given)[:200]!r}: see the docs for the three forms"
        )
    pairs = zip(tests["inputs"], tests["outputs"], strict=True)
    if name := tests.get("fn_name"):
        return [_call(program, str(name), arguments, expected, deadline_s) for arguments, expected in pairs]
    return [
        Test(Job(program, _text(given).encode(), deadline_s=deadline_s), _text(out), "output") for given, out in pairs
    ]


def _call(program: str, name: str, arguments: Any, expected: Any, deadline_s: float) -> Test:
    mark = secrets.token_hex(8)
    code = program + _CALL.format(name=name, mark=mark)
    return Test(Job(code, json.dumps(arguments).encode(), deadline_s=deadline_s), expected, "call", mark)


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def same_output(output: str, expected: str) -> bool:
    mine, theirs = ([line.split() for line in text.rstrip().splitlines()] for text in (output, expected))
    return len(mine) == len(theirs) and all(
        len(left) == len(right) and all(map(_same_word, left, right)) for left, right in zip(mine, theirs, strict=True)
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    try:
        return Decimal(word) == Decimal(expected)
    except InvalidOperation:
        return False


def same_value(value: Any, expected: Any) -> bool:
    """Equal as JSON; floats nearly."""
    if isinstance(value, float) or isinstance(expected, float):
        numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in (value, expected))
        return numbers and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[key], expected[key]) for key in value)
    return type(value) is type(expected) and bool(value == expected)


GRADER = Grader("code", CodeSettings, run=run, sandbox=True)
