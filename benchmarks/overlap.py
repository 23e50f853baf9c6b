"""Do generation and training overlap? Time per step at staleness 2 against the longer of the two alone.

With staleness 0 the trainer waits for a whole generation and then works: its waiting is generation alone (task to graded
sample, the engine's taking of the weights with it), the rest of its step is training alone (optimizer step, digest, log,
publication, checkpoint). With staleness 2 both go on at once; the ideal is the longer of the two.

    .venv/bin/python benchmarks/overlap.py [--recipe demo] [--steps 14] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys

from runs import Run, report, run

WARM_UP = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # equal rewards would let the trainer skip work, and shorter answers would change generation: learn nothing
    settings = [f"trainer.steps={arguments.steps}", "trainer.learning_rate=1e-9", "evaluation=[]"]
    alone = run(arguments.recipe, [*settings, "trainer.staleness=0"])
    both = run(arguments.recipe, [*settings, "trainer.staleness=2"])
    generation = statistics.mean(step["metrics"]["seconds_wait"] for step in alone.steps[WARM_UP + 1 :])
    training = per_step(alone) - generation
    overlapped = per_step(both)
    ratio = overlapped / max(generation, training)
    print(
        f"generation alone {generation:.2f} s, training alone {training:.2f} s, one after the other {per_step(alone):.2f} s"
    )
    print(f"overlapped {overlapped:.2f} s a step: {ratio:.2f} of the longer one")
    stale = max(step["staleness_max"] for step in alone.steps)
    figures = {"benchmark": "overlap", "generation_s": generation, "training_s": training, "overlapped_s": overlapped,
               "one_after_the_other_s": per_step(alone), "ratio": ratio, "staleness_max_at_0": stale}  # fmt: skip
    bars = {"overlapped within 1.15 of the longer one": ratio <= 1.15, "staleness 0 trains nothing older": stale == 0}
    return report(figures, bars, arguments.json)


def per_step(done: Run) -> float:
    steps = done.steps[WARM_UP:]
    return (steps[-1]["created"] - steps[0]["created"]) / (len(steps) - 1)


if __name__ == "__main__":
    sys.exit(main())
