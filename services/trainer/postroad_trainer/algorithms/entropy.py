"""Entropy of the policy at every token, also from logits whose vocabulary is split over ranks."""

from __future__ import annotations

from typing import Any

import torch

from postroad_trainer.algorithms.segments import Reduce, alone


def entropy(
    logits_NV: torch.Tensor, temperature: float = 1.0, reduce_max: Reduce = alone, reduce_sum: Reduce = alone
) -> torch.Tensor:
    """float32 [N]: H = log sum exp z - sum softmax(z) z with z = logits / temperature; differentiable.

    For the entropy bonus, loss -= coefficient H (Williams and Peng 1991; Mnih et al. 2016, arXiv:1602.01783, §4).
    V may be this rank's part of the vocabulary: reduce_max and reduce_sum then work over the tensor-parallel group, whose
    ranks all call it and hold the same loss. Padding of the vocabulary must be -inf or cut off first.
    Gradient: dH/dz = -p (log p + H), computed here, so no reduction needs a backward.
    """
    return _Entropy.apply(logits_NV, temperature, reduce_max, reduce_sum)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, temperature: float, reduce_max: Reduce, reduce_sum: Reduce
    ) -> torch.Tensor:
        scaled_NV = logits_NV.float() / temperature
        scaled_NV = scaled_NV - reduce_max(scaled_NV.amax(1))[:, None]
        weight_NV = scaled_NV.exp()
        finite_NV = torch.where(weight_NV > 0, scaled_NV, 0.0)
        total_N, product_N = reduce_sum(torch.stack([weight_NV.sum(1), (weight_NV * finite_NV).sum(1)]))
        normaliser_N = total_N.log()
        entropy_N = normaliser_N - product_N / total_N
        ctx.save_for_backward(finite_NV, weight_NV, normaliser_N, entropy_N)
        ctx.temperature, ctx.dtype = temperature, logits_NV.dtype
        return entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        finite_NV, weight_NV, normaliser_N, entropy_N = ctx.saved_tensors
        probability_NV = weight_NV / normaliser_N.exp()[:, None]
        slope_NV = -probability_NV * (finite_NV - (normaliser_N - entropy_N)[:, None])
        return (gradients[0][:, None] * slope_NV / ctx.temperature).to(ctx.dtype), None, None, None
