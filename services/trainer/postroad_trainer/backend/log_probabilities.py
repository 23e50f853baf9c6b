"""Log-probabilities of chosen tokens from logits, with their entropy: one softmax for forward and backward."""

from __future__ import annotations

from typing import Any

import torch


class TokenLogProbabilities(torch.autograd.Function):
    """log softmax(logits / temperature) at (which[i], target[i]).

    logits: [u, V]; which, target: int64 [p] (several predictions may come from one row of logits).
    Returns float32 [p] log-probabilities and [u] entropies (no gradient). Gradient of the logits, with weights g:
    (sum of g at the chosen tokens - softmax x sum of g of the row) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, which: torch.Tensor, target: torch.Tensor,
                temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits.float() / temperature if temperature != 1.0 else logits.float()
        normaliser = torch.logsumexp(scaled, -1, keepdim=True)
        probabilities = (scaled - normaliser).exp_()
        chosen = scaled[which, target] - normaliser[which, 0]
        entropy = normaliser[:, 0] - torch.linalg.vecdot(probabilities, scaled)
        ctx.save_for_backward(probabilities, which, target)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, which, target = ctx.saved_tensors
        gradient = gradients[0] / ctx.temperature
        of_row = torch.zeros(len(probabilities), dtype=gradient.dtype, device=gradient.device)
        of_row.index_add_(0, which, gradient)
        result = probabilities * -of_row[:, None]
        result.index_put_((which, target), gradient, accumulate=True)
        return result.to(ctx.dtype), None, None, None
