"""The life of a trainer: open → resume → (batch → step → log → publish → checkpoint) … → finish."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postroad.bus import AlreadyPublished, Bus, LoggedMessage
from postroad.config import Environment, Recipe
from postroad.messages import Dropped, Sample, Step
from postroad.store import Store
from postroad.telemetry.tracing import span
from postroad.weights import Publisher
from postroad_trainer.checkpoint import Checkpoints, Position
from postroad_trainer.data import Conversations, Dataset, Row, open_dataset
from postroad_trainer.evaluation import Evaluator
from postroad_trainer.export import export_model
from postroad_trainer.feeder import group_name, group_number
from postroad_trainer.ledger import Batch, Ledger, LedgerSettings
from postroad_trainer.plug_points import plug_point
from postroad_trainer.ranks import Leader, TorchThread
from postroad_trainer.retrain import Divergence, retrain
from postroad_trainer.road import Road
from postroad_trainer.teacher import Teacher, packed

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
BROKEN_STEPS = 3


class NotFiniteGradients(RuntimeError):
    """The run makes NaN: it would only go on wasting samples."""


@dataclass
class Data:
    train: Dataset
    evaluation: dict[str, Dataset]


def open_data(recipe: Recipe, model: Path) -> Data:
    """The data sets of the recipe. No row of an evaluation is ever trained on."""
    evaluation = {section.name: open_dataset(section.data) for section in recipe.evaluation}
    held_out: set[str] = set()
    for section in recipe.evaluation:
        data = evaluation[section.name]
        held_out |= data.prompts(min(section.rows, len(data)))
    count_tokens = prompt_counter(recipe, model) if recipe.data.max_prompt_tokens else None
    return Data(open_dataset(recipe.data, exclude=held_out, count_tokens=count_tokens), evaluation)


def prompt_counter(recipe: Recipe, model: Path) -> Callable[[list[dict[str, Any]]], int]:
    """How many tokens a prompt has once it is rendered."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = recipe.model.chat_template

    def count(prompt: list[dict[str, Any]]) -> int:
        rendered = tokenizer.apply_chat_template(
            prompt, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    return count


class TrainerService:
    def __init__(self, environment: Environment, recipe: Recipe) -> None:
        self.environment, self.recipe = environment, recipe
        self.thread = TorchThread()
        self.leader = Leader(self.thread, recipe, environment.model)
        checkpoint = recipe.trainer.checkpoint
        self.checkpoints = Checkpoints(environment.folder / "checkpoints", environment.run, checkpoint.keep)
        self.staleness_max = 0
        self.position = Position(environment.run, 0, 0, "", 0, 1)
        algorithm, temperature = recipe.trainer.algorithm, recipe.rollout.sampling.temperature
        teacher = (algorithm.teacher_url, temperature, environment.teacher_key)
        self.teacher = Teacher(*teacher) if algorithm.distillation_coefficient else None
        self._broken, self._seconds_before = 0, dict[str, float]()
        self._publishing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Train to the recipe's last step. Raises what ends the run; a clean return is a finished run."""
        environment = self.environment
        self.bus = await Bus.connect(environment.nats_url, environment.run)
        self.store = await Store.connect(environment.redis_url, environment.run)
        weights = self.recipe.weights
        self.publisher = Publisher(
            self.bus, self.store, environment.key, host=environment.host, advertise=environment.advertise,
            transports=weights.transports, folder=Path(weights.folder) / environment.run if weights.folder else None,
        )  # fmt: skip
        beat = asyncio.create_task(self._heartbeat())
        try:
            await self.bus.create_streams()
            await self.publisher.start()
            data = await asyncio.to_thread(open_data, self.recipe, environment.model)
            await self.leader.open()
            await self._resume()
            await self._train(data)
            await self.leader.stop()
        finally:
            beat.cancel()
            if self._publishing is not None:
                self._publishing.cancel()
                await asyncio.wait({self._publishing})
            await self.publisher.close()
            await self.store.close()
            await self.bus.close()
            await self.thread.close()

    # ── resume ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def _resume(self) -> None:
        """Load the newest checkpoint and train the logged steps after it again: same samples, same digests."""
        newest = await asyncio.to_thread(self.checkpoints.newest)
        if newest is not None:
            folder, self.position = newest
            await self.leader.load(folder / "backend")
            digest = await self.leader.digest()
            if digest != self.position.digest:
                raise Divergence(f"checkpoint {folder} has digest {digest}, it was saved as {self.position.digest}")
        else:
            self.position = Position(self.environment.run, 0, 0, await self.leader.digest(), 0, 1)
            await self._log(Step(
                run=self.environment.run, id="0", number=0, version=0, digest=self.position.digest,
                sequences=[], samples=[], groups=[], created=time.time(),
            ))  # fmt: skip
        async for step, digest in retrain(self.bus, self.leader, self.position.step + 1):
            if digest != step.digest:
                raise Divergence(f"step {step.number} gave digest {digest} again, the log says {step.digest}")
            logger.info("step %d trained again from the log, digest equal", step.number)
            resolved = [*step.groups, *(dropped.group for dropped in step.dropped)]
            numbers = [number for name in resolved if (number := group_number(name)) is not None]
            self.position = Position(
                self.environment.run, step.number, step.version, digest,
                max([self.position.next_number, *(number + 1 for number in numbers)]), self.position.sample_sequence,
            )  # fmt: skip
        await self._publish(self.position.version, self.position.digest)
        await self._published()

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────
    async def _train(self, data: Data) -> None:
        trainer = self.recipe.trainer
        ledger = Ledger(
            LedgerSettings(trainer.steps, trainer.groups_per_step, self.recipe.group_size, trainer.staleness,
                           trainer.filter, trainer.max_filtered),
            version=self.position.version, next_number=self.position.next_number,
        )  # fmt: skip
        given = None
        if trainer.algorithm.supervised:
            given = await asyncio.to_thread(Conversations, self.recipe, self.environment.model)
        loss = self._loss_of(given) if given is not None else None
        evaluator = Evaluator(self.bus, self.store, self.recipe, data.evaluation, loss)
        road = Road(self.bus, self.recipe, data.train, ledger, evaluator, given)
        working = asyncio.create_task(road.run(self.position.sample_sequence))
        steps = asyncio.create_task(self._steps(road, evaluator))
        try:
            await asyncio.wait({working, steps}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            if steps.done():
                steps.result()
        finally:
            for task in (working, steps):
                task.cancel()
            await asyncio.gather(working, steps, return_exceptions=True)

    def _loss_of(self, given: Conversations) -> Callable[[list[Row]], Awaitable[float]]:
        async def loss(rows: list[Row]) -> float:
            run = self.environment.run
            samples = await asyncio.to_thread(lambda: [given.samples(row, run, "evaluation", 0)[0] for row in rows])
            return await self.leader.score(samples)

        return loss

    async def _steps(self, road: Road, evaluator: Evaluator) -> None:
        total = self.recipe.trainer.steps
        await evaluator.run(self.position.version, total)
        while self.position.step < total:
            await self._step(road)
            if evaluator.due(self.position.version, total):
                await self._published()
                await evaluator.run(self.position.version, total)
        await self._published()
        await export_model(self.leader, self.environment, self.position.version)

    async def _step(self, road: Road) -> None:
        started = time.monotonic()
        batch = await road.next_batch()
        waited = time.monotonic()
        groups = [[road.samples[member.sample] for member in members] for members in batch.groups]
        if self.teacher is not None:
            groups = await self.teacher.scored(groups)
        scored = time.monotonic()
        version = self.position.version
        with span("step", number=version + 1):
            metrics, digest = await self.leader.step(groups, version)
            trained = time.monotonic()
            step = self._step_record(batch, groups, digest)
            step = step.model_copy(update={
                "seconds": trained - started,
                "metrics": {
                    **metrics, **self._seconds_before, "seconds_wait": waited - started,
                    "seconds_teacher": scored - waited, "seconds_train": trained - scored,
                },
            })  # fmt: skip
            await self._log(step)
            self._count_broken(step)
            await self._publish(step.version, digest)
            road.complete_step(batch, step.version)
        self.position = Position(
            self.environment.run, step.number, step.version, digest, road.ledger.resolved_below, road.sample_sequence()
        )
        self.staleness_max = max(self.staleness_max, step.staleness_max)
        await self._tell()
        if step.number % self.recipe.trainer.checkpoint.every == 0 or step.number == self.recipe.trainer.steps:
            await self._checkpoint()

    def _count_broken(self, step: Step) -> None:
        """Raises NotFiniteGradients at the third step in a row whose gradient was not finite."""
        self._broken = self._broken + 1 if step.metrics.get("gradients_not_finite") else 0
        if self._broken == BROKEN_STEPS:
            first = step.number - BROKEN_STEPS + 1
            raise NotFiniteGradients(
                f"the gradients of steps {first} to {step.number} were not finite; their batches are in the log: look at "
                f"them with `postroad replay --steps {first}:{step.number}` and other settings (--set)"
            )

    def _step_record(self, batch: Batch, groups: list[list[Sample]], digest: str) -> Step:
        version = self.position.version
        oldest = min(sample.trajectory.oldest_version for samples in groups for sample in samples)
        members = [member for group in batch.groups for member in group]
        return Step(
            run=self.environment.run, id=str(version + 1), number=version + 1, version=version + 1, digest=digest,
            sequences=[member.sequence for member in members], samples=[member.sample for member in members],
            groups=[group_name(number) for number in batch.numbers],
            dropped=[Dropped(group=group_name(d.number), reason=d.reason, samples=d.samples) for d in batch.dropped],
            teacher_log_probabilities=packed(groups), staleness_max=version - oldest, created=time.time(),
        )  # fmt: skip

    async def _log(self, step: Step) -> None:
        """Write the step to the log. It holds each step once: a different one there means a second trainer."""
        subject = self.bus.subjects.step(step.number)
        try:
            await self.bus.publish(subject, step, once=True)
        except AlreadyPublished:
            logged = await self.bus.last("STEPS", subject)
            if not isinstance(logged, LoggedMessage) or not isinstance(logged.message, Step):
                raise
            if (logged.message.digest, logged.message.samples) != (step.digest, step.samples):
                raise Divergence(
                    f"step {step.number} is logged already with digest {logged.message.digest}, not {step.digest}: "
                    "is another trainer of this run alive, or has the model or the recipe changed?"
                ) from None

    async def _publish(self, version: int, digest: str) -> None:
        """Begin to give the weights to the engines, where there are any."""
        if self.recipe.trainer.algorithm.supervised:
            return
        await self._published()
        await self.publisher.make_room()
        finish = await self.leader.freeze(self.environment.run, version)

        async def hand_over() -> None:
            started = time.monotonic()
            await self.publisher.publish(await asyncio.to_thread(finish), digest)
            self._seconds_before = {"seconds_publish_before": time.monotonic() - started}

        self._publishing = asyncio.create_task(hand_over())

    async def _published(self) -> None:
        """Wait until the last version is out: it is handed over while the next step is trained. Raises WeightsError."""
        if self._publishing is not None:
            await self._publishing

    async def _checkpoint(self) -> None:
        loop = asyncio.get_running_loop()

        def save_backend(folder: Path) -> None:
            asyncio.run_coroutine_threadsafe(self.leader.save(folder), loop).result()

        saved = await asyncio.to_thread(self.checkpoints.save, self.position, save_backend)
        if path := self.recipe.trainer.plug_points.after_save:
            await asyncio.to_thread(plug_point("trainer.plug_points.after_save", path), saved, self.position.step)

    # ── being seen ───────────────────────────────────────────────────────────────────────────────────────────────
    async def _tell(self) -> None:
        position = self.position
        await self.store.set("trainer", {
            "step": position.step, "version": position.version, "steps": self.recipe.trainer.steps,
            "staleness_max": self.staleness_max,
        })  # fmt: skip

    async def _heartbeat(self) -> None:
        while True:
            position = self.position
            info = {"pid": os.getpid(), "version": position.version, "step": position.step}
            await self.store.register("trainer", self.environment.name or "trainer", info, 3 * HEARTBEAT_S)
            await asyncio.sleep(HEARTBEAT_S)
