"""Log-probabilities of chosen tokens from logits, with their entropy, a few rows of logits at a time.

A float32 softmax of all rows would be the largest tensor of a step; in blocks it stays in reused memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BLOCK_ELEMENTS = 1 << 21


def _blocks(logits: torch.Tensor, temperature: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, a float32 copy of logits[rows] / temperature)."""
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        yield block, logits[block].to(torch.float32, copy=True).div_(temperature)


class TokenLogProbabilities(torch.autograd.Function):
    """log softmax(logits / temperature) at (which[i], target[i]).

    logits: [u, V]; which, target: int64 [p] (several predictions may come from one row of logits).
    Returns float32 [p] log-probabilities and [u] entropies (no gradient). Gradient of the logits, with weights g:
    (sum of g at the chosen tokens - softmax x sum of g of the row) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, which: torch.Tensor, target: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normaliser = torch.empty(len(logits), device=logits.device)
        entropy = torch.empty_like(normaliser)
        for block, scaled in _blocks(logits, temperature):
            normaliser[block] = torch.logsumexp(scaled, -1)
            probabilities = (scaled - normaliser[block, None]).exp_()
            entropy[block] = normaliser[block] - torch.linalg.vecdot(probabilities, scaled)
        chosen = logits[which, target].float() / temperature - normaliser[which]
        ctx.save_for_backward(logits, normaliser, which, target)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, normaliser, which, target = ctx.saved_tensors
        weight = gradients[0] / ctx.temperature
        of_row = torch.zeros_like(normaliser).index_add_(0, which, weight)
        result = torch.empty_like(logits)
        for block, scaled in _blocks(logits, ctx.temperature):
            gradient = scaled.sub_(normaliser[block, None]).exp_().mul_(-of_row[block, None])
            inside = (which >= block.start) & (which < block.stop)
            gradient.index_put_((which[inside] - block.start, target[inside]), weight[inside], accumulate=True)
            result[block] = gradient
        return result, None, None, None
