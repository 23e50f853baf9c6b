"""The trainer's ends of the road: tasks out, samples in, dead letters counted. The decisions are the ledger's."""

from __future__ import annotations

import asyncio
import logging
import time

from postroad.bus import AlreadyPublished, Bus, InvalidMessage, LoggedMessage
from postroad.config import Recipe
from postroad.messages import DeadLetter, Message, Sample
from postroad_trainer.data import Conversations, Dataset, prompt_index
from postroad_trainer.evaluation import Evaluator
from postroad_trainer.feeder import group_name, group_number, train_task
from postroad_trainer.ledger import Assignment, Batch, Ledger, Member

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 60.0
TICK_S = 1.0


class Road:
    """Feeds tasks and collects samples for `ledger`. With `given` conversations it feeds their samples instead, by the same
    log. `run` works until cancelled."""

    def __init__(
        self,
        bus: Bus,
        recipe: Recipe,
        data: Dataset,
        ledger: Ledger,
        evaluator: Evaluator,
        given: Conversations | None = None,
    ) -> None:
        self.bus, self.recipe, self.data, self.ledger, self.evaluator = bus, recipe, data, ledger, evaluator
        self.given = given
        self.samples: dict[str, Sample] = {}
        self.late: dict[str, int] = {}
        self._deadlines: dict[int, float] = {}
        self._sequences: dict[str, int] = {}
        self._read_to = 0
        self._progress = asyncio.Event()
        self._credit = asyncio.Event()
        self._credit.set()

    async def run(self, sample_sequence: int) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed())
            group.create_task(self._read_samples(sample_sequence))
            group.create_task(self._read_dead())
            group.create_task(self._watch_deadlines())

    async def next_batch(self) -> Batch:
        """Wait for the ledger's next batch. Every group has its deadline, so this ends."""
        while (batch := self.ledger.take_batch()) is None:
            self._credit.set()  # dropped groups free credit
            self._progress.clear()
            await self._progress.wait()
        return batch

    def complete_step(self, batch: Batch, version: int) -> None:
        self.ledger.complete_step(version)
        done = [member.sample for members in batch.groups for member in members]
        done += [sample for dropped in batch.dropped for sample in dropped.samples]
        for sample in done:
            self.samples.pop(sample, None)
            self._sequences.pop(sample, None)
        for number in [n for n in self._deadlines if n < self.ledger.resolved_below]:
            del self._deadlines[number]
        self._credit.set()

    def sample_sequence(self) -> int:
        """Where a restart must read SAMPLES from, so as to find every sample of an open group."""
        return min(self._sequences.values(), default=self._read_to + 1)

    async def _feed(self) -> None:
        while True:
            await self._credit.wait()
            self._credit.clear()
            while (assignment := self.ledger.next_assignment()) is not None:
                self._progress.set()
                if assignment.complete:
                    continue
                messages = await asyncio.to_thread(self._messages, assignment)
                for subject, message in messages:
                    try:
                        await self.bus.publish(subject, message, once=True)
                    except AlreadyPublished:
                        logger.info("%s is on its way already", message.id)

    def _messages(self, assignment: Assignment) -> list[tuple[str, Message]]:
        """What asks for a group: its task, or its samples where they are given."""
        recipe, run = self.recipe, self.bus.subjects.run
        number, version = assignment.number, assignment.minimum_version
        if self.given is None:
            task = train_task(recipe, run, self.data, number, version)
            self._deadlines[number] = task.deadline
            return [(self.bus.subjects.task(task.group), task)]
        row = self.data.row(prompt_index(recipe.seed, number, len(self.data), shuffle=recipe.data.shuffle))
        samples = self.given.samples(row, run, group_name(number), version)
        return [(self.bus.subjects.sample(sample.group, sample.member), sample) for sample in samples]

    async def _read_samples(self, start: int) -> None:
        async for entry in self.bus.replay("SAMPLES", start=start, follow=True):
            if isinstance(entry, InvalidMessage):
                await self._bury(entry)
            elif entry is not None:
                self._take(entry)
                self._read_to = entry.sequence

    def _take(self, entry: LoggedMessage) -> None:
        sample = entry.message
        if not isinstance(sample, Sample):
            logger.error("SAMPLES %d holds a %s", entry.sequence, sample.kind)
            return
        number = group_number(sample.group)
        if number is None:
            self.evaluator.add(sample)
            return
        member = Member(
            number, sample.member, entry.sequence, sample.id, sample.reward, sample.trajectory.oldest_version
        )
        verdict = self.ledger.add(member)
        if verdict == "accepted":
            self.samples[sample.id] = sample
            self._sequences[sample.id] = entry.sequence
        else:
            self.late[verdict] = self.late.get(verdict, 0) + 1
        self._progress.set()

    async def _read_dead(self) -> None:
        async for entry in self.bus.replay("DEAD", follow=True):
            if isinstance(entry, LoggedMessage) and isinstance(entry.message, DeadLetter):
                letter = entry.message
                number = group_number(letter.group)
                if number is None:
                    self.evaluator.fail(letter.group, letter.reason)
                elif self.ledger.fail(number, letter.reason):
                    logger.warning("group %d is dropped: %s (%s)", number, letter.reason, letter.error)
                self._progress.set()

    async def _bury(self, entry: InvalidMessage) -> None:
        tokens = entry.subject.split(".")
        letter = DeadLetter(
            run=self.bus.subjects.run, id=f"SAMPLES.{entry.sequence}", stage="sample", reason="invalid_message",
            error=entry.error, group=tokens[2], member=int(tokens[3]) if tokens[3].isdigit() else None,
            source=entry.subject, sequence=entry.sequence, payload=entry.payload, created=time.time(),
        )  # fmt: skip
        await self.bus.publish(self.bus.subjects.dead("sample"), letter)

    async def _watch_deadlines(self) -> None:
        """The worker aborts at the deadline; this catches the group whose worker never came to say so."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.time()
            for number in self.ledger.incomplete():
                if now > self._deadlines.get(number, now) + DEADLINE_GRACE_S and self.ledger.fail(number, "deadline"):
                    logger.warning(
                        "group %d is dropped: nothing came %.0f s after its deadline", number, DEADLINE_GRACE_S
                    )
                    self._progress.set()
