"""The KV cache: slots of fixed length that keep their content after a request ends, for prefix reuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .weights import ModelConfig


class SlotCache:
    """Keys and values of `slots` sequences, shape [slots, kv_heads, max_length, head_dim] per layer, with the tokens
    they belong to. Memory is bounded by this shape and touched page by page as sequences grow."""

    def __init__(self, config: ModelConfig, slots: int, max_length: int, dtype: torch.dtype, device: str) -> None:
        shape = (slots, config.kv_heads, max_length, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        narrow = np.uint8 if config.experts <= 256 else np.uint16
        self.experts: NDArray[Any] = np.empty((slots, max_length, len(config.moe_layers), config.top_k), narrow)
        self.tokens: NDArray[np.int32] = np.zeros((slots, max_length), np.int32)
        self.length = np.zeros(slots, np.int64)  # tokens written in the slot, computed or about to be
        self.computed = np.zeros(slots, np.int64)  # of these, how many have their keys and values
        self.reusable = np.ones(slots, bool)  # False: mixed-version keys (keep_kv), never a prefix for others
        self.busy = np.zeros(slots, bool)
        self._used_at = np.zeros(slots, np.int64)
        self._clock = 0

    def common_prefix(self, tokens: NDArray[np.int32], limit: int) -> NDArray[np.int64]:
        """Length of the common prefix of `tokens[:limit]` with what is written in each slot; shape [slots]."""
        if limit == 0:
            return np.zeros(len(self.length), np.int64)
        differs = self.tokens[:, :limit] != tokens[:limit]
        first = np.where(differs.any(1), differs.argmax(1), limit)
        return np.where(self.reusable, np.minimum(first, self.length), 0)

    def acquire(self, tokens: NDArray[np.int32], common: NDArray[np.int64]) -> tuple[int, int] | None:
        """Take a free slot for `tokens` and fill it with the longest computed prefix -> (slot, reused), or None."""
        free = np.flatnonzero(~self.busy)
        if not len(free):
            return None
        ready = np.minimum(common, self.computed)
        source = int(ready.argmax())
        reused = int(ready[source])
        oldest = free[np.argsort(self._used_at[free], kind="stable")]
        slot = int(oldest[0])
        if not self.busy[source] and reused and (len(free) == 1 or reused == self.computed[source]):
            slot = source  # continues what the slot holds: nothing to copy
        elif slot == source and reused and len(free) > 1:
            slot = int(oldest[1])  # keep the prefix for the next request that shares it
        if slot != source and reused:
            for store in (*self.keys, *self.values):
                store[slot, :, :reused] = store[source, :, :reused]
            self.experts[slot, :reused] = self.experts[source, :reused]
        self.tokens[slot, : len(tokens)] = tokens
        self.length[slot], self.computed[slot] = len(tokens), reused
        self.busy[slot] = self.reusable[slot] = True
        self._clock += 1
        self._used_at[slot] = self._clock
        return slot, reused

    def append(self, slot: int, token: int) -> None:
        self.tokens[slot, self.length[slot]] = token
        self.length[slot] += 1

    def export(self, slot: int, count: int) -> torch.Tensor:
        """Keys and values of the slot's first `count` tokens, [layers, 2, kv_heads, count, head_dim]."""
        pairs = zip(self.keys, self.values, strict=True)
        return torch.stack([torch.stack([store[slot, :, :count] for store in pair]) for pair in pairs]).cpu()

    def install(self, slot: int, keys_values: torch.Tensor, experts: NDArray[Any]) -> None:
        """Take over what another engine computed of the slot's first tokens (the counterpart of `export`)."""
        count = keys_values.shape[3]
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys[slot, :, :count], values[slot, :, :count] = keys_values[layer].to(keys.device)
        self.experts[slot, :count] = experts
        self.computed[slot] = count

    def release(self, slot: int) -> None:
        """Free a slot; what was computed stays as a prefix, unless its keys are of mixed versions."""
        self.busy[slot] = False
        self.length[slot] = self.computed[slot] = self.computed[slot] if self.reusable[slot] else 0
        self.reusable[slot] = True
        self._clock += 1
        self._used_at[slot] = self._clock

    def forget(self) -> None:
        """Drop every prefix of a sequence that has ended; running ones go on, but are never a prefix for others."""
        self.reusable[self.busy] = False
        self.length[~self.busy] = self.computed[~self.busy] = 0
