"""`python -m postroad_trainer.replay --steps A:B [--json] [--set trainer.learning_rate=…]`: train logged steps again.

With the recipe as it was, every digest must equal the logged one: exit 1 where one differs. With `--set`, the same
samples are trained with other hyper-parameters, and digests are expected to differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from postroad.bus import Bus
from postroad.config import Environment, Recipe, load_recipe
from postroad.supervisor.processes import die_with_parent
from postroad_trainer.checkpoint import Checkpoints
from postroad_trainer.ranks import Leader, TorchThread
from postroad_trainer.retrain import retrain


async def replay(environment: Environment, recipe: Recipe, first: int, last: int, as_json: bool) -> bool:
    """Print a line per step; whether all digests are equal."""
    bus = await Bus.connect(environment.nats_url, environment.run)
    thread = TorchThread()
    leader = Leader(thread, recipe, environment.model)
    try:
        await leader.open()
        checkpoints = Checkpoints(environment.folder / "checkpoints", environment.run, recipe.trainer.checkpoint.keep)
        start = await asyncio.to_thread(checkpoints.at_or_before, first - 1)
        done = 0
        if start is not None:
            await leader.load(start[0] / "backend")
            done = start[1].step
        equal = True
        async for step, digest in retrain(bus, leader, done + 1, last):
            if step.number < first:
                continue
            line = {"step": step.number, "digest": digest, "logged_digest": step.digest, "equal": digest == step.digest}
            equal &= digest == step.digest
            verdict = "equal" if line["equal"] else f"differs from {step.digest}"
            print(json.dumps(line) if as_json else f"step {step.number}: {digest} {verdict}", flush=True)
        await leader.stop()
        return equal
    finally:
        await thread.close()
        await bus.close()


def main() -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", required=True, metavar="A:B", help="first and last step, both included")
    parser.add_argument("--json", action="store_true", help="one JSON object per step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    arguments = parser.parse_args()
    try:
        first, last = (int(part) for part in arguments.steps.split(":"))
    except ValueError:
        parser.error(f"--steps {arguments.steps!r} is not of the form A:B")
    if not 1 <= first <= last:
        parser.error(f"--steps {arguments.steps}: steps are counted from 1, and A is not above B")
    environment = Environment.read()
    recipe = load_recipe(environment.recipe, arguments.set)
    equal = asyncio.run(replay(environment, recipe, first, last, arguments.json))
    return 0 if equal or arguments.set else 1


if __name__ == "__main__":
    sys.exit(main())
