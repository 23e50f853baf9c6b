"""Core attention over trees with a shared prompt, and the rotary embedding at the positions of a layout.

The attention of a micro-batch follows its Layout. The model is given the number of the layout in the place of
attention_mask, as a CPU tensor: activation checkpointing hands that very tensor to the recompute, so attention finds
the right layout even when other micro-batches were run in between.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.varlen import varlen_attn

from postroad_trainer.backend.compiled import compiled_on_gpu
from postroad_trainer.backend.visibility import LayoutTable, Padded, Spans

# from so many positions on torch's flash attention is faster on the CPU than materialised scores, which win below
LONG = {torch.float32: 128, torch.bfloat16: 512}


class _Gather(torch.autograd.Function):
    """x[index] along dim 0 where `inverse` undoes it: the backward gathers too, instead of a slow scatter-add.

    Slots that `inverse` does not name are padding, whose gradient is 0 because nothing reads or sees them.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Ungather(torch.autograd.Function):
    """The way back from padded slots: padding gets gradient 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.rows = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        full = gradients[0].new_zeros((ctx.rows, *gradients[0].shape[1:]))
        return full.index_copy_(0, ctx.saved_tensors[0], gradients[0]), None


class _Repeated(torch.autograd.Function):
    """x[index] along dim 0, where a prompt's rows are named by each of its responses; their gradients add up in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].new_zeros((ctx.rows, *gradients[0].shape[1:]), dtype=torch.float32)
        return total.index_add_(0, ctx.saved_tensors[0], gradients[0].float()).to(gradients[0].dtype), None


class _GatherStripes(torch.autograd.Function):
    """[T / size, ...] of every context rank, one behind the other; backward sums the ranks' gradients of the own part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradients[0].contiguous()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None


class TreeAttention(MegatronModule):
    """query, key, value [t, 1, heads, head_dim], not rotated yet -> [t, 1, heads * head_dim].

    With context parallelism a rank has the queries of its stripe and gathers the keys and values of all.
    """

    def __init__(
        self,
        table: LayoutTable,
        config: Any,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self._table = table
        self._scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        layout = self._table.get(attention_mask)
        query, key, value = _rotate(query[:, 0], *layout.rotation), _rotate(key[:, 0], *layout.rotation), value[:, 0]
        if query.is_cuda and query.dtype == torch.bfloat16 and layout.stripe.size == 1:
            return _flash(query, key, value, layout.spans, self._scale).flatten(1)[:, None]
        if self.config.context_parallel_size > 1:
            group = get_context_parallel_group()
            key, value = _GatherStripes.apply(key, group), _GatherStripes.apply(value, group)
        return _masked(query, key, value, layout.padded, self._scale)[:, None]


@compiled_on_gpu
def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of x [t, heads, head_dim]; cosines and sines [t, 1, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """Flash attention, every response against its prompt and itself: keys of a prompt are read once per response."""
    if spans.keys is not None:
        key, value = _Repeated.apply(key, spans.keys), _Repeated.apply(value, spans.keys)
    grouped = {"enable_gqa": True}
    if "enable_gqa" not in _VARLEN_ARGUMENTS:
        grouped, repeats = {}, query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # the mask is aligned to the ends of queries and keys: a response's first query sees the whole prompt
    causal = {"window_size": (-1, 0)} if "window_size" in _VARLEN_ARGUMENTS else {"is_causal": True}
    sizes = (spans.query_ends, spans.key_ends, spans.longest_query, spans.longest_key)
    return varlen_attn(query, key, value, *sizes, scale=scale, **causal, **grouped)


_VARLEN_ARGUMENTS = inspect.signature(varlen_attn).parameters


def _masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Padded, scale: float) -> torch.Tensor:
    """Masked attention over trees that are padded to the longest of the micro-batch; [t, heads * head_dim]."""
    sides = ((query, layout.queries), (key, layout.keys), (value, layout.keys))
    q, k, v = (
        _Gather.apply(x, side.padded, side.slots).unflatten(0, (len(layout.visible), -1)).transpose(1, 2)
        for x, side in sides
    )  # [n, heads, P, head_dim]
    if q.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.visible, scale=scale, enable_gqa=True)
    elif layout.causal and q.shape[2] >= LONG[q.dtype]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        out = _grouped_attention(q, k, v, layout.visible, scale)
    return _Ungather.apply(out.transpose(1, 2).flatten(0, 1).flatten(1), layout.queries.slots)


def _grouped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention with the queries of a key's group side by side, so that keys are not repeated.

    On the CPU in bfloat16 its forward and backward take 0.4 of the time of scaled_dot_product_attention's
    (8 trees of 102 positions, 9 heads on 3 keys, 1 thread, Nov 2026); trees are short, so the scores fit.
    """
    trees, heads, length, _ = query.shape
    groups = key.shape[1]
    folded = query.reshape(trees, groups, -1, query.shape[-1]) * scale
    scores = (folded @ key.transpose(-1, -2)).view(trees, heads, length, -1)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return (weights.view(trees, groups, -1, key.shape[2]) @ value).view(trees, heads, length, -1)
