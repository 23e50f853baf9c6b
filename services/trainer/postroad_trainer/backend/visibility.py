"""How the positions of a micro-batch see each other, as tensors for the attention and the rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from postroad_trainer.backend.layout import PROMPT, Tree
from postroad_trainer.backend.settings import BackendError


@dataclass(frozen=True)
class Stripe:
    """The positions rank, rank + size, rank + 2 size, ... of a micro-batch: what one context rank computes.

    Striped attention (Brandon et al. 2023, arXiv:2311.09431): causal work is even over the ranks without any padding.
    """

    rank: int = 0
    size: int = 1

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The stripe's part of values [T, ...]."""
        return values[self.rank :: self.size]


WHOLE = Stripe()


@dataclass
class Slots:
    """Where positions lie in n trees padded to P: padded int64 [n*P] is the position in each slot (0 in empty ones),
    slots int64 [T] its inverse."""

    padded: torch.Tensor
    slots: torch.Tensor


@dataclass
class Layout:
    """How the positions of a stripe attend to all T positions of their micro-batch. n trees, padded for attention.

    positions: int64 [T / size], for the rotary embedding. queries: of the stripe. keys: of all positions, in the order
    in which the stripes are gathered. visible: bool [n, 1, queries of a tree, keys of a tree].
    """

    positions: torch.Tensor
    queries: Slots
    keys: Slots
    visible: torch.Tensor

    @staticmethod
    def of(trees: list[Tree], device: torch.device, stripe: Stripe = WHOLE) -> Layout:
        lengths = [len(tree) for tree in trees]
        number, place = np.repeat(np.arange(len(trees)), lengths), np.concatenate([np.arange(n) for n in lengths])
        segments = np.concatenate([tree.segments for tree in trees])
        total = len(number)
        mine = np.arange(stripe.rank, total, stripe.size)
        gathered = np.concatenate([np.arange(rank, total, stripe.size) for rank in range(stripe.size)])
        query_slots, key_slots = (_padded(number[which], len(trees)) for which in (mine, gathered))

        def side(which: np.ndarray, slots: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            places = np.full(len(slots[0]), -1)
            kinds = np.full(len(slots[0]), -1)
            places[slots[1]], kinds[slots[1]] = place[which], segments[which]
            return places.reshape(len(trees), -1), kinds.reshape(len(trees), -1)

        query_place, query_segment = (values[:, :, None] for values in side(mine, query_slots))
        key_place, key_segment = (values[:, None, :] for values in side(gathered, key_slots))
        visible = ((key_segment == PROMPT) | (key_segment == query_segment)) & (key_place <= query_place)
        visible &= key_place >= 0
        visible |= (query_place < 0) & (key_place == 0)  # an empty slot must see something, or its softmax is NaN

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return Layout(
            put(np.concatenate([tree.positions for tree in trees])[mine]),
            Slots(put(query_slots[0]), put(query_slots[1])),
            Slots(put(key_slots[0]), put(key_slots[1])),
            put(visible[:, None]),
        )


def _padded(number: np.ndarray, trees: int) -> tuple[np.ndarray, np.ndarray]:
    """(padded, slots) for positions of the trees `number`, in their order."""
    order = np.argsort(number, kind="stable")
    counts = np.bincount(number, minlength=trees)
    longest = int(counts.max())
    starts = np.cumsum(counts) - counts
    slots = np.empty(len(number), np.int64)
    slots[order] = np.arange(len(number)) - starts[number[order]] + number[order] * longest
    padded = np.zeros(len(counts) * longest, np.int64)
    padded[slots] = np.arange(len(number))
    return padded, slots


class LayoutTable:
    """The layouts of the step that is running, by number; the last one added is that of the forward under way."""

    def __init__(self) -> None:
        self._layouts: list[Layout] = []

    def add(self, layout: Layout) -> torch.Tensor:
        """The layout's number, to be passed as attention_mask."""
        self._layouts.append(layout)
        return torch.tensor(len(self._layouts) - 1)

    def get(self, number: torch.Tensor) -> Layout:
        return self._layouts[int(number)]

    @property
    def current(self) -> Layout:
        if not self._layouts:
            raise BackendError("no layout was set before the model ran; use the verbs of MegatronBackend")
        return self._layouts[-1]

    def clear(self) -> None:
        self._layouts.clear()
