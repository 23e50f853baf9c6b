"""Log-probabilities of chosen tokens from logits, with their entropy, a few rows of logits at a time.

A float32 softmax of all rows would be the largest tensor of a step. On the CPU it is made in blocks, in reused memory; on
the GPU compiled kernels never write it. The vocabulary may be split over the ranks of a tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from postroad_trainer.backend.compiled import compiled_on_gpu

BLOCK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Vocabulary:
    """Column 0 of this rank's logits is token `first`; the ranks of `group` have the other columns (None: nobody)."""

    first: int = 0
    group: Any = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def logsumexp(self, values: torch.Tensor) -> torch.Tensor:
        """logsumexp over the ranks, of each rank's own."""
        if self.group is None:
            return values
        parts = [torch.empty_like(values) for _ in range(self.group.size())]
        dist.all_gather(parts, values, group=self.group)
        return torch.logsumexp(torch.stack(parts), 0)

    def columns(self, target: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(column of each target, whether this rank has it; column 0 if not)."""
        column = target - self.first
        here = (column >= 0) & (column < width)
        return column.where(here, 0), here


WHOLE_VOCABULARY = Vocabulary()


def _blocks(logits: torch.Tensor, temperature: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, a float32 copy of logits[rows] / temperature)."""
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        scaled = logits[block].to(torch.float32, copy=True)
        yield block, scaled if temperature == 1.0 else scaled.div_(temperature)


@compiled_on_gpu
def _compiled_logsumexp(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.logsumexp(logits.float() / temperature, -1)


@compiled_on_gpu
def _compiled_expected(logits: torch.Tensor, normaliser: torch.Tensor, temperature: float) -> torch.Tensor:
    scaled = logits.float() / temperature
    return (torch.exp(scaled - normaliser[:, None]) * scaled).sum(-1)


@compiled_on_gpu
def _compiled_slope(
    logits: torch.Tensor, normaliser: torch.Tensor, entropy: torch.Tensor, of_row: torch.Tensor,
    of_entropy: torch.Tensor | None, temperature: float,
) -> torch.Tensor:  # fmt: skip
    logarithm = logits.float() / temperature - normaliser[:, None]
    slope = of_row[:, None]
    if of_entropy is not None:
        slope = slope + of_entropy[:, None] * (logarithm + entropy[:, None])
    return (-torch.exp(logarithm) * slope).to(logits.dtype)


def _normalised(logits: torch.Tensor, temperature: float, vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithm of the softmax's denominator, and the mean of the scaled logits under it, [u] each."""
    if logits.is_cuda:
        normaliser = vocabulary.logsumexp(_compiled_logsumexp(logits, temperature))
        return normaliser, vocabulary.sum(_compiled_expected(logits, normaliser, temperature))
    own, expected = torch.empty(len(logits)), torch.empty(len(logits))
    for block, scaled in _blocks(logits, temperature):
        own[block] = torch.logsumexp(scaled, -1)
        expected[block] = torch.linalg.vecdot((scaled - own[block, None]).exp_(), scaled)
    normaliser = vocabulary.logsumexp(own)
    return normaliser, vocabulary.sum(expected * (own - normaliser).exp_())


def _slope(
    logits: torch.Tensor, normaliser: torch.Tensor, entropy: torch.Tensor, of_row: torch.Tensor,
    of_entropy: torch.Tensor | None, temperature: float,
) -> torch.Tensor:  # fmt: skip
    """Gradient of the logits but for the chosen tokens' own part: -p x (of_row + of_entropy x (log p + H))."""
    if logits.is_cuda:
        return _compiled_slope(logits, normaliser, entropy, of_row, of_entropy, temperature)
    result = torch.empty_like(logits)
    for block, scaled in _blocks(logits, temperature):
        logarithm = scaled.sub_(normaliser[block, None])
        if of_entropy is None:
            result[block] = logarithm.exp_().mul_(-of_row[block, None])
        else:
            slope = (logarithm + entropy[block, None]).mul_(of_entropy[block, None]).add_(of_row[block, None])
            result[block] = logarithm.exp_().mul_(slope.neg_())
    return result


class TokenLogProbabilities(torch.autograd.Function):
    """log softmax(logits / temperature) at (which[i], target[i]), and the entropy of every row.

    logits: [u, V / ranks]; which, target: int64 [p] (several predictions may come from one row of logits).
    Returns float32 [p] log-probabilities and [u] entropies, equal on all ranks. Gradient of the logits, with weights g of
    the log-probabilities and e of the entropies, p = softmax, H = entropy:
    (sum of g at the chosen tokens - p x sum of g of the row - e x p x (log p + H)) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        which: torch.Tensor,
        target: torch.Tensor,
        temperature: float,
        vocabulary: Vocabulary = WHOLE_VOCABULARY,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normaliser, expected = _normalised(logits, temperature, vocabulary)
        column, here = vocabulary.columns(target, logits.shape[1])
        chosen = vocabulary.sum((logits[which, column].float() / temperature).where(here, 0)) - normaliser[which]
        entropy = normaliser - expected
        ctx.save_for_backward(logits, normaliser, entropy, which, column, here)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor, None, None, None, None]:
        logits, normaliser, entropy, which, column, here = ctx.saved_tensors
        of_chosen, of_entropy = (None if gradient is None else gradient / ctx.temperature for gradient in gradients)
        weight = torch.zeros(len(which), device=logits.device) if of_chosen is None else of_chosen
        of_row = torch.zeros_like(normaliser).index_add_(0, which, weight)
        weight = weight.where(here, 0)
        result = _slope(logits, normaliser, entropy, of_row, of_entropy, ctx.temperature)
        result.index_put_((which, column), weight.to(result.dtype), accumulate=True)
        return result, None, None, None, None
