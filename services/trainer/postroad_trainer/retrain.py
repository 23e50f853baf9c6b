"""Training logged steps again, bit for bit: the road from a checkpoint back to the end of the step log."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator

from postroad.bus import Bus, LoggedMessage
from postroad.messages import Sample, Step
from postroad_trainer.ranks import Leader
from postroad_trainer.teacher import unpacked


class Divergence(RuntimeError):
    """The same samples gave other parameters, or the log is not this run's: going on would break exactly-once."""


async def logged_steps(bus: Bus, first: int, last: int | None = None) -> list[Step]:
    """Steps `first` to `last` of the log in order. Raises Divergence where one is missing."""
    steps = [
        entry.message
        async for entry in bus.replay("STEPS")
        if isinstance(entry, LoggedMessage) and isinstance(entry.message, Step)
    ]
    chosen = sorted(
        (s for s in steps if s.number >= first and (last is None or s.number <= last)), key=lambda s: s.number
    )
    numbers = [step.number for step in chosen]
    end = last if last is not None else first + len(numbers) - 1
    if numbers != list(range(first, end + 1)):
        raise Divergence(f"the step log holds steps {numbers} of {first} to {end}")
    return chosen


async def samples_of(bus: Bus, step: Step) -> list[list[Sample]]:
    """The batch of a logged step: its samples in their order, by group."""
    samples: list[Sample] = []
    for sequence, name in zip(step.sequences, step.samples, strict=True):
        sample = (await bus.get("SAMPLES", sequence)).message
        if not isinstance(sample, Sample) or sample.id != name:
            raise Divergence(f"SAMPLES {sequence} holds {sample.id}, step {step.number} trained {name}")
        samples.append(sample)
    groups: OrderedDict[str, list[Sample]] = OrderedDict()
    for sample in unpacked(samples, step.teacher_log_probabilities):
        groups.setdefault(sample.group, []).append(sample)
    return list(groups.values())


async def retrain(bus: Bus, leader: Leader, first: int, last: int | None = None) -> AsyncIterator[tuple[Step, str]]:
    """Train the logged steps again; each with the digest that it gave now."""
    for step in await logged_steps(bus, first, last):
        _, digest = await leader.step(await samples_of(bus, step), step.number - 1)
        yield step, digest
