"""Micro-batches through megatron's schedule: plain, pipelined or interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from postroad_trainer.backend.construction import BuiltModel
from postroad_trainer.backend.head import Head, ValueHead
from postroad_trainer.backend.objective import MicroBatch
from postroad_trainer.backend.replay import ExpertReplays
from postroad_trainer.backend.visibility import Stripe

# (micro-batch, log-probabilities [p], entropies [u]) -> (loss, what is kept of the micro-batch)
Outcome = Callable[[MicroBatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]


class Runner:
    """Runs this rank's chunks. `wrapped` are the same chunks inside of megatron's DDP."""

    def __init__(self, built: BuiltModel, wrapped: list[Any], replays: list[ExpertReplays], stripe: Stripe) -> None:
        self._built, self._wrapped, self._stripe = built, wrapped, stripe
        self._replays = dict(zip(map(id, wrapped), replays, strict=True))

    def run(self, batches: list[MicroBatch], temperature: float, outcome: Outcome, forward_only: bool) -> list[Any]:
        """What `outcome` keeps of each micro-batch; nothing on ranks that are not in the last pipeline stage."""
        last = self._built.chunks[-1]
        head = (ValueHead if hasattr(last, "value_head") else Head)(last, self._stripe, temperature)

        def forward(iterator: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
            batch = next(iterator)
            number = self._built.table.add(batch.layout)
            self._replays[id(model)].feed(None if batch.experts is None else self._stripe.of(batch.experts))
            tokens = self._stripe.of(batch.tokens[0])[None]
            output = model(tokens, None, number, output_processor=head, output_processor_context=batch)

            def loss(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Any]:
                value, kept = outcome(batch, *output)
                return value, torch.tensor(len(output[0]), dtype=torch.int), kept

            return output, loss

        several = len(self._wrapped) > 1
        try:
            return list(
                get_forward_backward_func()(
                    forward_step_func=forward,
                    data_iterator=[iter(batches) for _ in self._wrapped] if several else iter(batches),
                    model=self._wrapped if several else self._wrapped[0],
                    num_microbatches=len(batches),
                    seq_length=1,
                    micro_batch_size=1,
                    forward_only=forward_only,
                )
            )
        finally:
            self._built.table.clear()
            for replays in self._replays.values():
                replays.feed(None)
