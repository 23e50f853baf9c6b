"""From graded samples to a trained version: what runs on the torch thread of every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from postroad.config import Recipe
from postroad.messages import Sample
from postroad.weights import Snapshot
from postroad_trainer.algorithms import grpo_advantages
from postroad_trainer.backend import BackendSettings, MegatronBackend
from postroad_trainer.batch import StepResult, StepSettings, TrainRow

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}


def rows_of(groups: Sequence[Sequence[Sample]], *, normalise_std: bool) -> list[TrainRow]:
    """The rows of a batch in its order, with each group's advantages."""
    rows = []
    for samples in groups:
        rewards = torch.tensor([[sample.reward for sample in samples]], dtype=torch.float64)
        advantages = grpo_advantages(rewards, normalise_std)[0].tolist()
        for sample, advantage in zip(samples, advantages, strict=True):
            trajectory = sample.trajectory
            rows.append(
                TrainRow(
                    sample_id=sample.id,
                    group=sample.group,
                    tokens=trajectory.tokens,
                    loss_mask=trajectory.loss_mask,
                    logprobs=trajectory.log_probabilities,
                    advantage=advantage,
                    routed_experts=trajectory.routed_experts,
                )
            )
    return rows


def step_settings(recipe: Recipe, version: int) -> StepSettings:
    """Settings of the step that trains `version`; the learning rate rises linearly over the warm-up steps."""
    trainer = recipe.trainer
    warmup = min(1.0, (version + 1) / trainer.warmup_steps) if trainer.warmup_steps else 1.0
    return StepSettings(
        learning_rate=trainer.learning_rate * warmup,
        clip_low=trainer.algorithm.clip_low,
        clip_high=trainer.algorithm.clip_high,
        tis_cap=trainer.algorithm.weight_high,
        temperature=recipe.rollout.sampling.temperature,
        grad_clip=trainer.grad_clip,
        reducer=trainer.algorithm.reducer,
        constant_length=recipe.rollout.sampling.max_new_tokens,
    )


class Training:
    """The model and its optimizer on this rank. Every method is called on all ranks, in the same order."""

    def __init__(self, recipe: Recipe, model: Path) -> None:
        trainer = recipe.trainer
        self.recipe = recipe
        self.backend = MegatronBackend(
            BackendSettings(
                model_path=model,
                dtype=recipe.model.dtype,
                threads=trainer.threads,
                adam_beta1=trainer.adam_beta1,
                adam_beta2=trainer.adam_beta2,
                weight_decay=trainer.weight_decay,
                freeze_embedding=trainer.freeze_embedding,
                micro_batch_tokens=trainer.micro_batch_tokens,
                seed=recipe.seed,
            )
        )

    def step(self, groups: Sequence[Sequence[Sample]], version: int) -> tuple[StepResult, str]:
        """Train `version` on the batch; the result and the digest of the parameters that it made."""
        rows = rows_of(groups, normalise_std=self.recipe.trainer.algorithm.advantage == "group")
        result = self.backend.train_step(rows, step_settings(self.recipe, version))
        return result, self.backend.digest()

    def digest(self) -> str:
        return self.backend.digest()

    def freeze(self, run: str, version: int) -> Snapshot:
        """A snapshot of the parameters, in the Hugging Face layout."""
        return Snapshot.freeze(
            run, version, (_bytes_of(name, tensor) for name, tensor in self.backend.export_weights())
        )

    def save(self, folder: Path) -> None:
        self.backend.save(folder)

    def load(self, folder: Path) -> None:
        self.backend.load(folder)

    def close(self) -> None:
        """Leave the process groups, whose threads would otherwise abort the interpreter at its end."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _bytes_of(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...], np.ndarray]:
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), flat.numpy()


def metrics_of(result: StepResult) -> dict[str, float]:
    """The numbers of a step result, flat; what is not known is left out."""
    flat: dict[str, float] = {}
    for name, value in asdict(result).items():
        if isinstance(value, dict):
            flat |= {f"seconds_{phase}": float(seconds) for phase, seconds in value.items()}
        elif isinstance(value, (int, float)):
            flat[name] = float(value)
    return flat
