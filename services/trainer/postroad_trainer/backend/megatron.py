"""MegatronBackend: the verbs that the trainer service calls. All ranks call each of them, with the same arguments."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from postroad_trainer.backend import checkpoint
from postroad_trainer.backend.cpu_shim import cpu_mode, import_megatron
from postroad_trainer.backend.layout import Limits, Plan, plan
from postroad_trainer.backend.objective import (
    SUMS,
    MicroBatch,
    Objective,
    by_row,
    objective,
    rows_to_run,
    scatter,
    scores_of_run,
    weigh,
)
from postroad_trainer.backend.parallel import Ranks, initialise
from postroad_trainer.backend.recording import chosen_experts
from postroad_trainer.backend.reference import Reference
from postroad_trainer.backend.routing import Routed, routed
from postroad_trainer.backend.settings import BackendError, BackendSettings
from postroad_trainer.backend.visibility import Stripe
from postroad_trainer.batch import StepResult, StepSettings, TrainRow
from postroad_trainer.models.weights import digest_of, entries_of


class MegatronBackend:
    """A model and its optimizer on megatron-core, in any layout of ranks (recipe: trainer.parallel).

    May be built and called in any thread, by one thread at a time. Raises ModelError for a model folder that can't
    be used, BackendError for anything else about itself, RowError for rows that can't be trained.
    """

    def __init__(
        self,
        settings: BackendSettings,
        keep_reference: bool = False,
        model_provider: Callable[[list[Any], BackendSettings], None] | None = None,
        critic: bool = False,
    ) -> None:
        """critic: the model has a value head, and `logprobs` gives its values."""
        import_megatron()
        from postroad_trainer.backend import construction
        from postroad_trainer.backend.gather import Gatherer
        from postroad_trainer.backend.replay import ExpertReplays
        from postroad_trainer.backend.runner import Runner
        from postroad_trainer.backend.state import State
        from postroad_trainer.backend.value_head import add_value_head

        self._settings = settings
        with self._running():
            initialise(settings)
            self._ranks = Ranks()
            self._stripe = Stripe(self._ranks.context.rank(), self._ranks.context.size())
            self._built = built = construction.build_model(settings)
            self._chunks, self._config = built.chunks, built.config
            self._moe_layers = sum(built.config.moe_layer_freq) if built.config.num_moe_experts else 0
            valued = add_value_head(settings, built) if critic else []
            if model_provider is not None:
                model_provider(built.chunks, settings)
            parameters = [parameter for chunk in built.chunks for parameter in chunk.parameters()]
            self._reference = Reference(parameters) if keep_reference else None
            self._replays = [ExpertReplays(chunk) for chunk in built.chunks]
            self._wrapped = construction.wrap_chunks(settings, built.chunks)
            self._runner = Runner(built, self._wrapped, self._replays, self._stripe)
            self._optimizer = construction.build_optimizer(settings, self._wrapped)
            self._inner_optimizers = construction.torch_optimizers(self._optimizer)
            entries = [*entries_of(built.chunks, built.family), *valued]
            self._gatherer = Gatherer(entries, built.mapping, self._ranks)
            self._state = State(entries, built.mapping, self._optimizer, self._ranks)
        self._device = entries[0].parameter.device

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        torch.set_num_threads(self._settings.threads)  # a property of the calling thread
        with cpu_mode(), warnings.catch_warnings():
            # megatron warns of deprecated calls between its own modules
            warnings.filterwarnings("ignore", module=r"megatron\.")
            yield

    # -- training ------------------------------------------------------------------------------------------------

    def train_step(self, rows: Sequence[TrainRow], settings: StepSettings) -> StepResult:
        """One optimizer step on the whole batch; this rank runs its share of the rows that the loss needs.

        Nothing is changed when no row is needed or when the gradient is not finite (StepResult.skipped).
        """
        started = time.perf_counter()
        self._validate(rows)
        chosen = self._routed(rows_to_run(rows, settings.algorithm), self._settings.unknown_experts)
        active, counts = chosen.rows, {"experts_unknown": chosen.unknown, "rows_unrouted": chosen.left_out}
        if not active:
            return self._result(
                rows,
                seconds={"total": time.perf_counter() - started},
                loss=0.0,
                skipped=True,
                skip_reason="no row has an advantage and a trained token"
                + (f" ({chosen.left_out} lack recorded experts)" if chosen.left_out else ""),
                rows_skipped=len(rows),
                **counts,
            )
        with self._running():
            planned = self._plan(active)
            batches = [MicroBatch.of(trees, self._device, self._stripe) for trees in planned.micro_batches]
            weigh(batches, rows, settings)
            ready = time.perf_counter()
            for chunk in self._wrapped:
                chunk.zero_grad_buffer()
            outcomes = self._run(batches, settings)
            measured = self._measure(outcomes, rows, active, batches)
            ran = time.perf_counter()
            grad_norm, stepped = self._update(settings)
        ended = time.perf_counter()
        return self._result(
            rows,
            **measured,
            **counts,
            grad_norm=grad_norm,
            skipped=not stepped,
            gradients_not_finite=int(not stepped),
            skip_reason=None if stepped else f"the gradient norm is {grad_norm}",
            rows_skipped=len(rows) - len(active),
            computed_tokens=planned.computed_tokens,
            prompts_not_shared=planned.prompts_not_shared,
            seconds={
                "plan": ready - started,
                "forward_backward": ran - ready,
                "optimizer": ended - ran,
                "total": ended - started,
            },
        )

    def logprobs(self, rows: Sequence[TrainRow], temperature: float = 1.0, reference: bool = False) -> list[np.ndarray]:
        """The model's log-probability of every trained token: float32 [T] per row, 0 where the mask is 0.

        reference: of the weights that the backend was built with; recorded experts are not replayed on them.
        """
        if not rows:
            return []
        self._validate(rows)
        settings = StepSettings(learning_rate=0.0, temperature=temperature)
        trained = [(index, row) for index, row in enumerate(rows) if row.loss_mask.any()]
        if not trained:
            return [np.zeros(len(row.tokens), np.float32) for row in rows]
        if reference:
            if self._reference is None:
                raise BackendError("no reference was kept: build the backend with keep_reference")
            trained = [(index, replace(row, routed_experts=None)) for index, row in trained]
        weights = self._reference.active() if reference and self._reference else contextlib.nullcontext()
        with self._running(), torch.no_grad(), weights:
            planned = self._plan(self._routed(trained, "record").rows)
            batches = [MicroBatch.of(trees, self._device, self._stripe) for trees in planned.micro_batches]
            scores = [score[None] for score in self._run(batches, settings, forward_only=True)]
            self._take_counts()
            whole = self._ranks.over_batch(scatter(rows, batches, scores))
        return [score[0].copy() for score in by_row(rows, whole)]

    def record_experts(self, rows: Sequence[TrainRow]) -> list[np.ndarray]:
        """The experts that the model's routers choose: uint16 [T-1, MoE layers, topk] of each row, to be replayed later.

        Unknown (65535) behind the last trained token of a row, which is no input. Every row needs a trained token.
        """
        self._validate(rows)
        with self._running(), torch.no_grad():
            free = [(index, replace(row, routed_experts=None)) for index, row in enumerate(rows)]
            planned = self._plan(free, share_prompts=False)
            batches = [MicroBatch.of(trees, self._device, self._stripe) for trees in planned.micro_batches]
            for replays in self._replays:
                replays.keep(True)
            self._run(batches, StepSettings(learning_rate=0.0), forward_only=True)
            kept = {layer: choices for replays in self._replays for layer, choices in replays.keep(False).items()}
            self._take_counts()
            shape = (self._moe_layers, self._config.moe_router_topk)
            parallel = self._settings.parallel.sequence_parallel
            return chosen_experts(planned.micro_batches, kept, rows, shape, self._ranks, parallel)

    def _validate(self, rows: Sequence[TrainRow]) -> None:
        if not rows:
            raise BackendError("a step needs at least one row")
        model, config = self._chunks[0], self._config
        longest = min(self._settings.micro_batch_tokens, model.max_sequence_length)
        for row in rows:
            row.validate(model.vocabulary, longest)
            row.validate_routing(self._moe_layers, config.moe_router_topk, config.num_moe_experts or 0)

    def _routed(self, rows: list[tuple[int, TrainRow]], policy: str) -> Routed:
        return routed(rows, (self._moe_layers, self._config.moe_router_topk), policy)

    def _plan(self, rows: list[tuple[int, TrainRow]], share_prompts: bool | None = None) -> Plan:
        settings, parallel = self._settings, self._settings.parallel
        limits = Limits(
            settings.tree_tokens,
            settings.micro_batch_tokens,
            settings.share_prompts if share_prompts is None else share_prompts,
            positions=parallel.context * (parallel.tensor if parallel.sequence_parallel else 1),
            micro_batches=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )
        return plan(rows, limits, self._ranks.data.rank(), self._ranks.data.size())

    def _run(self, batches: list[MicroBatch], settings: StepSettings, forward_only: bool = False) -> list[Any]:
        """Objective of each micro-batch, or log-probabilities [p] if forward_only; zeros where another pipeline stage
        has them."""

        def outcome(
            batch: MicroBatch, current: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, Objective | torch.Tensor]:
            if forward_only:
                return current.sum(), current
            result = objective(batch, current, entropy, settings)
            return result.loss, result

        results = self._runner.run(batches, settings.temperature, outcome, forward_only)
        if results:
            return results
        nothing = [torch.zeros(2, len(batch.row), device=self._device) for batch in batches]
        if forward_only:
            return [zeros[0] for zeros in nothing]
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self._device)
        return [Objective(sums[0], sums, zeros) for zeros in nothing]

    def _take_counts(self) -> list[float]:
        """(token-layers where the own experts differ, token-layers compared) of all ranks since the last call."""
        counts = sum(replays.take_counts().to(self._device) for replays in self._replays)
        return self._ranks.over_world(counts).tolist()

    def _measure(
        self,
        outcomes: list[Any],
        rows: Sequence[TrainRow],
        active: list[tuple[int, TrainRow]],
        batches: list[MicroBatch],
    ) -> dict[str, Any]:
        """Loss, sums and scores over all ranks."""
        differing, compared = self._take_counts()
        sums = self._ranks.over_batch(sum(outcome.sums for outcome in outcomes)).tolist()
        total = dict(zip(SUMS, sums, strict=True))
        flat = self._ranks.over_batch(scatter(rows, batches, [outcome.scores for outcome in outcomes]))
        return {
            "loss": total["loss"],
            "experts_differ_fraction": differing / compared if compared else None,
            "sums": {name: total[name] for name in SUMS},
            **scores_of_run(rows, active, flat),
        }

    def _update(self, settings: StepSettings) -> tuple[float, bool]:
        """(gradient norm before clipping, whether the optimizer stepped)."""
        optimizer = self._optimizer
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        finite = math.isfinite(grad_norm)
        if finite:
            for inner in self._inner_optimizers:
                for group in inner.param_groups:
                    group["lr"] = settings.learning_rate
            if settings.grad_clip:
                self._clip(settings.grad_clip, grad_norm)
            optimizer.step_with_ready_grads()
        # step() leaves p.grad aliasing main_grad; the next backward would count it twice, silently.
        optimizer.zero_grad()
        if any(parameter.grad is not None for chunk in self._chunks for parameter in chunk.parameters()):
            raise BackendError("a gradient is left after the step; the next one would count it twice")
        return grad_norm, finite

    def _clip(self, largest: float, grad_norm: float) -> None:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        for part in self._optimizer.chained_optimizers:
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, largest, grad_norm)

    @staticmethod
    def _result(rows: Sequence[TrainRow], **fields: Any) -> StepResult:
        unknown = dict.fromkeys(
            ("grad_norm", "logprob_abs_diff_mean", "logprob_abs_diff_max", "entropy", "experts_differ_fraction")
        )
        return StepResult(
            **{
                **unknown,
                "rows": len(rows),
                "rows_masked": sum(not row.loss_mask.any() for row in rows),
                "tokens": sum(len(row.tokens) for row in rows),
                "trained_tokens": sum(int(row.loss_mask.sum()) for row in rows),
                "gradients_not_finite": 0,
                "computed_tokens": 0,
                "prompts_not_shared": 0,
                "experts_unknown": 0,
                "rows_unrouted": 0,
                **fields,
            }
        )

    # -- weights and state -----------------------------------------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) one at a time on rank 0; the other ranks get nothing but must iterate too.

        A tensor may be the live parameter: copy it before the next step.
        """
        return self._gatherer.tensors()

    def digest(self) -> str:
        """xxh3_128 over the exported weights, in the order of their names (models.weights.digest_of), on all ranks."""
        digest = digest_of(self.export_weights())
        return self._ranks.tell_all(digest.encode())[0].decode()

    def save(self, folder: Path) -> None:
        """Writes an exact checkpoint to a folder that does not exist yet."""
        with self._running():
            checkpoint.save(folder, self._state, self._identity(), self._ranks)

    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint, bit for bit. Raises BackendError, the state unchanged, if it can't be used."""
        with self._running():
            checkpoint.load(folder, self._state, self._identity(), self._ranks)

    def _identity(self) -> checkpoint.Identity:
        settings = self._settings
        return checkpoint.Identity(
            self._built.family.architecture,
            settings.dtype,
            self._gatherer.elements(),
            self._gatherer.elements("model.embed_tokens.weight") if settings.freeze_embedding else 0,
            {**settings.parallel.model_dump(), "world": self._ranks.world},
        )
