"""The forward pass of Llama, Qwen3 and Qwen3-MoE over a flat batch of rows.

A row is one token of one sequence. Prompt chunks and decode steps of all running sequences share one call: linear
layers see only rows that are needed, attention runs per sequence over exactly its own keys, so no row is padded and a
sequence's attention does not depend on its neighbours. Formulas are those of transformers' modeling_{llama,qwen3,
qwen3_moe}.py, including the dtype of each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import SlotCache
from .weights import Layer, ModelConfig, Weights


@dataclass(frozen=True)
class Segment:
    """`count` consecutive tokens of the sequence in `slot`, the first at position `start`."""

    slot: int
    start: int
    count: int


@dataclass
class Run:
    """Rows first..first+rows-1 attend together: one chunk, or decode rows of adjacent slots at the same position."""

    first: int
    rows: int
    slot: int
    slots: int
    start: int


def plan(segments: list[Segment]) -> list[Run]:
    """Group segments into attention calls; best when decode segments are sorted by (start, slot)."""
    runs: list[Run] = []
    row = 0
    for s in segments:
        last = runs[-1] if runs else None
        if (
            last
            and s.count == 1
            and last.rows == last.slots
            and last.start == s.start
            and last.slot + last.slots == s.slot
        ):
            last.rows, last.slots = last.rows + 1, last.slots + 1
        else:
            runs.append(Run(row, s.count, s.slot, 1, s.start))
        row += s.count
    return runs


class Model:
    """Stateless but for the rotary tables; weights and cache are arguments, so that weights can be switched."""

    def __init__(self, config: ModelConfig, max_length: int, dtype: torch.dtype, device: str) -> None:
        self.config, self.device = config, device
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        angles = torch.outer(torch.arange(max_length, dtype=torch.float32), inverse).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    @torch.inference_mode()
    def forward(self, weights: Weights, cache: SlotCache, segments: list[Segment]) -> Tensor:
        """Compute all segments' tokens, write their keys, values and experts to `cache` -> hidden states [rows, D]."""
        slots = torch.tensor([s.slot for s in segments for _ in range(s.count)])
        positions = torch.tensor([p for s in segments for p in range(s.start, s.start + s.count)])
        ids = torch.from_numpy(cache.tokens)[slots, positions].to(self.device)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        runs = plan(segments)
        chosen: list[Tensor] = []
        x_TD = F.embedding(ids, weights.embedding)
        for i, layer in enumerate(weights.layers):
            keys, values = cache.keys[i], cache.values[i]
            q, k, v = self._heads(layer, x_TD, cos, sin)
            keys[slots, :, positions], values[slots, :, positions] = k, v
            attended = torch.cat([self._attend(q[r.first : r.first + r.rows], keys, values, r) for r in runs])
            x_TD = x_TD + F.linear(attended, layer.out)
            normed = F.rms_norm(x_TD, x_TD.shape[-1:], layer.norm2, self.config.norm_eps)
            if layer.router is None:
                x_TD = x_TD + mlp(normed, layer.gate_up, layer.down)
            else:
                mixed, experts_TK = self._experts(layer, layer.router, normed)
                x_TD = x_TD + mixed
                chosen.append(experts_TK)
        if chosen:
            cache.experts[slots.numpy(), positions.numpy()] = torch.stack(chosen, 1).cpu().numpy()
        return x_TD

    @torch.inference_mode()
    def logits(self, weights: Weights, hidden_TD: Tensor) -> Tensor:
        """Final norm and head -> float32 logits [rows, vocabulary]."""
        normed = F.rms_norm(hidden_TD, hidden_TD.shape[-1:], weights.norm, self.config.norm_eps)
        return F.linear(normed, weights.head).float()

    def _heads(self, layer: Layer, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        normed = F.rms_norm(x_TD, x_TD.shape[-1:], layer.norm1, c.norm_eps)
        qkv = F.linear(normed, layer.qkv).view(len(x_TD), -1, c.head_dim)
        qk, v = qkv[:, : c.heads + c.kv_heads], qkv[:, c.heads + c.kv_heads :]
        if layer.q_norm is not None:
            q = F.rms_norm(qk[:, : c.heads], (c.head_dim,), layer.q_norm, c.norm_eps)
            qk = torch.cat((q, F.rms_norm(qk[:, c.heads :], (c.head_dim,), layer.k_norm, c.norm_eps)), 1)
        half = c.head_dim // 2
        qk = qk * cos + torch.cat((-qk[..., half:], qk[..., :half]), -1) * sin
        return qk[:, : c.heads], qk[:, c.heads :], v

    def _attend(self, q_THd: Tensor, keys: Tensor, values: Tensor, run: Run) -> Tensor:
        c, end = self.config, run.start + run.rows // run.slots
        k = keys[run.slot : run.slot + run.slots, :, :end]
        v = values[run.slot : run.slot + run.slots, :, :end]
        if run.rows == run.slots:  # decode: the heads that share a key become query rows, so keys aren't repeated
            q = q_THd.reshape(run.rows, c.kv_heads, -1, c.head_dim)
            return F.scaled_dot_product_attention(q, k, v).reshape(run.rows, -1)
        mask = None
        if run.start:
            mask = torch.ones(run.rows, end, dtype=torch.bool, device=q_THd.device).tril(run.start)
        q = q_THd.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(run.rows, -1)

    def _experts(self, layer: Layer, router: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax router in float32, top-k, experts one group of rows at a time -> (output, experts [rows, k])."""
        scores = F.linear(x_TD, router).softmax(-1, dtype=torch.float32)
        gates_TK, chosen_TK = scores.topk(self.config.top_k)
        if self.config.normalise_top_k:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
        gates_TK = gates_TK.to(x_TD.dtype)
        out = torch.zeros_like(x_TD)
        for expert in chosen_TK.unique().tolist():
            rows, place = (chosen_TK == expert).nonzero(as_tuple=True)
            y = mlp(x_TD[rows], layer.gate_up[expert], layer.down[expert]) * gates_TK[rows, place, None]
            out.index_add_(0, rows, y)
        return out, chosen_TK


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)
