"""Experts by grouped matrix products on the GPU; the local spec of megatron runs one expert after the other."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP

ALIGNMENT = 8  # rows of an expert in bfloat16: grouped products read 16 bytes at a time


class GroupedExperts(SequentialMLP):
    """megatron's SequentialMLP, parameter by parameter; in bfloat16 on a GPU its products run in one kernel."""

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        hidden = permuted_local_hidden_states
        if not (hidden.is_cuda and hidden.dtype == torch.bfloat16) or self.num_local_experts == 1:
            return super().forward(hidden, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.to(hidden.device)
        padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = padded.cumsum(0)
        # where each row goes: behind the padding of the experts before its own
        shifts = (ends - padded) - (counts.cumsum(0) - counts)
        places = torch.arange(len(hidden), device=hidden.device)
        places = places + shifts.repeat_interleave(counts, output_size=len(hidden))
        rows = len(hidden) + ALIGNMENT * self.num_local_experts
        spread = hidden.new_zeros(rows, hidden.shape[1]).index_copy(0, places, hidden)
        scale = permuted_probs.new_zeros(rows).index_copy(0, places, permuted_probs)
        first, second = (
            torch.stack([getattr(expert, name).weight for expert in self.local_experts]).transpose(1, 2)
            for name in ("linear_fc1", "linear_fc2")
        )
        offsets = ends.to(torch.int32)
        inner = torch.nn.functional.grouped_mm(spread, first, offs=offsets)
        inner = weighted_bias_swiglu_impl(inner, None, scale[:, None])
        return torch.nn.functional.grouped_mm(inner, second, offs=offsets).index_select(0, places), None
