"""How fast the math grader is: answers a second on one core, beside math-verify alone on the same answers.

The answers are what models write for competition problems: mostly integers, a third fractions, roots, intervals, sets,
expressions, equations and units, in groups of eight attempts at one problem, half of them right. The verdicts of both
must be the same.

    .venv/bin/python benchmarks/reward.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable

from runs import report

from postroad_reward.graders import Attempt
from postroad_reward.graders.math import MathSettings, grade, verdict

PROSE = (
    "We start from the equation $x^2 - {a}x + {b} = 0$ and note that its discriminant is $\\Delta = {a}^2 - 4 \\cdot {b}$. "
    * 6
)
ENDS = (
    "Therefore the answer is $\\boxed{{{0}}}$.", "\n\\[\n\\boxed{{{0}}}\n\\]", "So we get\n$$\\boxed{{{0}}}$$",
    "**Answer:** \\boxed{{{0}}}",
)  # fmt: skip
SHAPES = (
    "\\frac{{{a}}}{{{b}}}", "{a}\\sqrt{{{b}}}", "({a}, {b})", "\\{{{a}, {b}\\}}", "[{a}, \\infty)", "{a}x + {b}", "{a}\\pi",
    "{a}.{b}", "x = {a}", "{a} \\text{{ cm}}",
)  # fmt: skip
MEMBERS, OTHERS = 8, 0.33


def attempts(groups: int, seed: int = 0) -> list[Attempt]:
    rng = random.Random(seed)
    made = []
    for _ in range(groups):
        shape = rng.choice(SHAPES) if rng.random() < OTHERS else "{a}"
        label, *wrong = (shape.format(a=rng.randint(2, 999), b=rng.randint(2, 99)) for _ in range(4))
        for _ in range(MEMBERS):
            answer = label if rng.random() < 0.5 else rng.choice(wrong)
            prose = PROSE.format(a=rng.randint(2, 99), b=rng.randint(2, 99))
            made.append(Attempt([], prose + rng.choice(ENDS).format(answer), label))
    return made


def timed(grader: Callable[[Attempt, MathSettings], float], work: list[Attempt]) -> tuple[float, list[float]]:
    """Answers a second of processor time, and the verdicts."""
    settings, started = MathSettings(), time.process_time()
    verdicts = [grader(attempt, settings) for attempt in work]
    return len(work) / (time.process_time() - started), verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # math-verify tells at length that its own time limit is off
    grade(Attempt([], "\\boxed{x}", "x"), MathSettings())  # its imports
    ours, verdicts = timed(grade, attempts(250 if arguments.quick else 2500))
    some = attempts(25 if arguments.quick else 125)
    theirs, expected = timed(lambda attempt, settings: verdict(str(attempt.label), attempt.response, settings), some)
    same = verdicts[: len(some)] == expected
    print(f"math {ours:.0f} answers a second on one core; math-verify alone {theirs:.0f}: {ours / theirs:.0f} times")
    figures = {
        "benchmark": "reward",
        "math_per_s": ours,
        "math_verify_per_s": theirs,
        "mean_reward": sum(verdicts) / len(verdicts),
    }
    return report(figures, {"at least 2,000 answers a second": ours >= 2000, "the same verdicts": same}, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
