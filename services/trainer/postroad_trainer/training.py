"""From graded samples to a trained version: what runs on the torch thread of every rank."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from postroad.config import Recipe
from postroad.messages import Sample
from postroad.weights import Snapshot
from postroad_trainer.algorithms import require_parts
from postroad_trainer.backend import BackendSettings, MegatronBackend
from postroad_trainer.backend.parallel import world_size
from postroad_trainer.batch import StepResult, StepSettings, TrainRow, merged
from postroad_trainer.conversion import Groups, rows_of, shaped_rewards, with_advantages, with_returns, without
from postroad_trainer.critic import Critic
from postroad_trainer.metrics import Trained, flops_per_token, step_metrics
from postroad_trainer.models import read_configuration
from postroad_trainer.plug_points import PlugPointError, plug_point

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}


def step_settings(recipe: Recipe, version: int) -> StepSettings:
    """Settings of the step that trains `version`; the learning rate rises linearly over the warm-up steps."""
    trainer = recipe.trainer
    warmup = min(1.0, (version + 1) / trainer.warmup_steps) if trainer.warmup_steps else 1.0
    length = trainer.algorithm.constant_length or recipe.rollout.sampling.max_new_tokens
    return StepSettings(
        learning_rate=trainer.learning_rate * warmup,
        algorithm=trainer.algorithm.model_copy(update={"constant_length": length}),
        temperature=1.0 if trainer.algorithm.supervised else recipe.rollout.sampling.temperature,
        grad_clip=trainer.grad_clip,
    )


class Training:
    """The model and its optimizer on this rank. Every method is called on all ranks, in the same order."""

    def __init__(self, recipe: Recipe, model: Path) -> None:
        trainer = recipe.trainer
        self.recipe, self.algorithm = recipe, trainer.algorithm
        self._configuration = read_configuration(model).values
        require_parts(self.algorithm)
        self.plugs = {
            name: plug_point(f"trainer.plug_points.{name}", path) for name, path in trainer.plug_points if path
        }
        settings = BackendSettings(
            model_path=model,
            dtype=recipe.model.dtype,
            threads=trainer.threads,
            parallel=trainer.parallel,
            adam_beta1=trainer.adam_beta1,
            adam_beta2=trainer.adam_beta2,
            weight_decay=trainer.weight_decay,
            freeze_embedding=trainer.freeze_embedding,
            micro_batch_tokens=trainer.micro_batch_tokens,
            unknown_experts=trainer.unknown_experts,
            seed=recipe.seed,
        )
        self.backend = MegatronBackend(
            settings,
            keep_reference=self.algorithm.needs_reference,
            model_provider=self.plugs.get("model_provider"),
        )
        self.critic = Critic(settings, self.algorithm) if self.algorithm.advantage == "gae" else None

    def step(self, groups: Groups, version: int) -> tuple[dict[str, float], str]:
        """Train `version` on the batch; its metrics and the digest of the parameters that it made."""
        started, settings = time.perf_counter(), step_settings(self.recipe, version)
        rows, numbers = self._scored(self._rows(groups), settings)
        rewards = self._rewards(groups)
        if self.critic is not None:
            rows, settings = self._criticised(rows, rewards, settings, numbers, version)
        rows = with_advantages(rows, rewards, settings.algorithm)
        result = merged([self._update(part, settings) for part in self._parts(rows, groups)])
        updated = time.perf_counter()
        digest = self.backend.digest()
        length = float(np.mean([len(row.tokens) for row in rows]))
        metrics = step_metrics(Trained(groups, rows, result, version), flops_per_token(self._configuration, length))
        numbers |= {"seconds_digest": time.perf_counter() - updated, "seconds_total": time.perf_counter() - started}
        return metrics | numbers, digest

    def _criticised(
        self,
        rows: list[TrainRow],
        rewards: list[float],
        settings: StepSettings,
        numbers: dict[str, float],
        version: int,
    ) -> tuple[list[TrainRow], StepSettings]:
        """The rows with the critic's values, from before its own update; in its first steps the policy's rate is 0."""
        assert self.critic is not None
        started = time.perf_counter()
        rows = self.critic.valued(rows)
        warmup = settings.learning_rate / self.recipe.trainer.learning_rate
        numbers |= self.critic.learn(with_returns(rows, rewards, settings.algorithm), settings, warmup)
        numbers["seconds_critic"] = time.perf_counter() - started
        alone = version < self.algorithm.critic_only_steps
        return rows, dataclasses.replace(settings, learning_rate=0.0) if alone else settings

    def _rows(self, groups: Groups) -> list[TrainRow]:
        rows = self.plugs["rows"](groups, rows_of) if "rows" in self.plugs else rows_of(groups)
        samples = [sample for members in groups for sample in members]
        if [row.sample_id for row in rows] != [sample.id for sample in samples]:
            raise PlugPointError("trainer.plug_points.rows must give a row for each sample, in their order")
        kept = [not self.algorithm.mask_truncated or sample.trajectory.finish_reason != "length" for sample in samples]
        if "sample_filter" in self.plugs:
            chosen = self.plugs["sample_filter"](samples)
            kept = [one and bool(other) for one, other in zip(kept, chosen, strict=True)]
        return without(rows, kept)

    def _rewards(self, groups: Groups) -> list[float]:
        rewards = shaped_rewards(groups, self.recipe)
        return list(self.plugs["rewards"](groups, rewards)) if "rewards" in self.plugs else rewards

    def _scored(self, rows: list[TrainRow], settings: StepSettings) -> tuple[list[TrainRow], dict[str, float]]:
        """The rows with the log-probabilities that the algorithm needs before the first update; seconds of each pass."""
        anchor, seconds = settings.algorithm.anchor, {}
        roles: list[str] = [anchor] if anchor in ("old", "proximal") else []
        for role in [*roles, "reference"] if settings.algorithm.needs_reference else roles:
            started = time.perf_counter()
            if hook := self.plugs.get("before_log_probabilities"):
                hook(self.backend, rows, role)
            scores = self.backend.logprobs(rows, settings.temperature, reference=role == "reference")
            rows = [
                dataclasses.replace(row, scores={**row.scores, role: score})
                for row, score in zip(rows, scores, strict=True)
            ]
            seconds[f"seconds_{role}"] = time.perf_counter() - started
        return rows, seconds

    def _parts(self, rows: list[TrainRow], groups: Groups) -> list[list[TrainRow]]:
        """The rows of each optimizer update: whole groups, equally many."""
        size = len(groups) // self.algorithm.updates
        ends = np.cumsum([0, *(len(members) for members in groups)])[::size]
        return [rows[start:end] for start, end in itertools.pairwise(ends)]

    def _update(self, rows: list[TrainRow], settings: StepSettings) -> StepResult:
        if hook := self.plugs.get("before_step"):
            rows = hook(self.backend, rows, settings) or rows
        return self.backend.train_step(rows, settings)

    def score(self, samples: Sequence[Sample]) -> float:
        """The mean negative log-probability of the samples' trained tokens."""
        rows = rows_of([samples])
        scores = self.backend.logprobs(rows, 1.0)
        tokens = np.concatenate([score[row.trained] for score, row in zip(scores, rows, strict=True)])
        return -float(tokens.mean(dtype=np.float64))

    def digest(self) -> str:
        return self.backend.digest()

    def freeze(self, run: str, version: int) -> Callable[[], Snapshot]:
        """A snapshot of the parameters as they are now, in the Hugging Face layout. What is returned finishes it, on any
        thread: on a GPU of its own a rank copies its weights there, and they leave it while training goes on."""
        weights = self.backend.export_weights()
        if world_size() > 1 or not torch.cuda.is_available():
            snapshot = Snapshot.freeze(run, version, (_bytes_of(name, tensor) for name, tensor in weights))
            return lambda: snapshot
        copies = [(name, tensor.detach().clone()) for name, tensor in weights]
        copied = torch.cuda.Event()
        copied.record()
        return lambda: Snapshot.freeze(run, version, _leaving(copies, copied))

    def save(self, folder: Path) -> None:
        self.backend.save(folder)
        if self.critic is not None:
            self.critic.save(folder.with_name("critic"))

    def load(self, folder: Path) -> None:
        self.backend.load(folder)
        if self.critic is not None:
            self.critic.load(folder.with_name("critic"))

    def close(self) -> None:
        """Leave the process groups, whose threads would otherwise abort the interpreter at its end."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _leaving(
    copies: list[tuple[str, torch.Tensor]], copied: torch.cuda.Event
) -> Iterator[tuple[str, str, tuple[int, ...], np.ndarray]]:
    """Bytes of tensors that lie on the GPU, on a stream beside that of the training."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_event(copied)
        for name, tensor in copies:
            yield _bytes_of(name, tensor)


def _bytes_of(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...], np.ndarray]:
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), flat.numpy()
