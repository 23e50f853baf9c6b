"""From the last hidden states to the log-probabilities of a micro-batch's predictions, equal on tensor and context ranks.

Only positions that predict a trained token go through the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from postroad_trainer.backend.log_probabilities import WHOLE_VOCABULARY, TokenLogProbabilities, Vocabulary
from postroad_trainer.backend.objective import MicroBatch
from postroad_trainer.backend.visibility import Stripe


class _Whole(torch.autograd.Function):
    """[n] values at `index` of [size], summed over the context ranks, which have the others. Every rank computes the
    same loss from the whole, so the gradient of its part is read off without another reduction."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        whole = values.new_zeros(size).index_copy_(0, index, values)
        dist.all_reduce(whole, group=state.get_context_parallel_group())
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class Head:
    """An output_processor of GPTModel. Returns log-probabilities [p] and entropies [u] of the whole micro-batch."""

    def __init__(self, chunk: Any, stripe: Stripe, temperature: float) -> None:
        self._stripe, self._temperature = stripe, temperature
        self._sequence_parallel = chunk.config.sequence_parallel
        self._vocabulary, self._columns = WHOLE_VOCABULARY, chunk.vocabulary
        if (ranks := state.get_tensor_model_parallel_world_size()) > 1:
            held = chunk.vocab_size // ranks
            first = held * state.get_tensor_model_parallel_rank()
            self._vocabulary = Vocabulary(first, state.get_tensor_model_parallel_group())
            self._columns = min(held, chunk.vocabulary - first)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        output_layer: Any,
        output_weight: torch.Tensor | None,
        context: MicroBatch,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sources, which, targets = context.sources, context.which, context.targets
        if self._stripe.size > 1:
            here = sources % self._stripe.size == self._stripe.rank
            predictions = here[which].nonzero()[:, 0]
            which = (here.cumsum(0) - 1)[which[predictions]]
            targets, rows = targets[predictions], here.nonzero()[:, 0]
            sources = sources[rows] // self._stripe.size
        weight = output_layer.weight if output_weight is None else output_weight
        chosen, entropy = self._scores(self._hidden(hidden_states, sources), which, targets, weight)
        if self._stripe.size > 1:
            chosen = _Whole.apply(chosen, predictions, len(context.which))
            entropy = _Whole.apply(entropy, rows, len(context.sources))
        return chosen, entropy

    def _scores(
        self, hidden: torch.Tensor, which: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight if len(weight) == self._columns else weight[: self._columns]
        arguments = (F.linear(hidden, weight), which, targets, self._temperature, self._vocabulary)
        return TokenLogProbabilities.apply(*arguments)

    def _hidden(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The hidden states [u, hidden] that predict, on every tensor rank; the backward sums over these."""
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states)[positions, 0]
        if self._vocabulary.group is not None:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
        return hidden_states[positions, 0]


class ValueHead(Head):
    """The critic's: values [p] of the states before the predicted tokens, in the place of log-probabilities; entropy 0."""

    def __init__(self, chunk: Any, stripe: Stripe, temperature: float) -> None:
        super().__init__(chunk, stripe, temperature)
        self._value = chunk.value_head

    def _scores(self, hidden: torch.Tensor, which: torch.Tensor, _: Any, __: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value = F.linear(hidden.float(), self._value.weight.float(), self._value.bias.float())[:, 0]
        return value[which], torch.zeros_like(value)
