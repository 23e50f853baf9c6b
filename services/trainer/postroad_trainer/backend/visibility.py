"""How the positions of a micro-batch see each other, as tensors for the attention and the rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from postroad_trainer.backend.layout import PROMPT, Tree


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
class Spans:
    """Consecutive queries and the keys that they see, causally from the end: a prompt, or a response behind its prompt.

    query_ends, key_ends: int32 [spans + 1], sums of lengths. keys: int64, the positions of the keys, span by span; None
    where these are all positions in their order.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int
    keys: torch.Tensor | None

    @staticmethod
    def of(trees: list[Tree], device: torch.device) -> Spans:
        queries, keys, offset = [], [], 0
        for tree in trees:
            lengths = np.bincount(tree.segments)
            if len(lengths) <= 2:  # a prompt with one response is one sequence
                lengths = np.array([len(tree)])
            prompt = np.arange(offset, offset + lengths[0])
            for number, length in enumerate(lengths):
                own = np.arange(offset, offset + length)
                queries.append(length)
                keys.append(np.concatenate([prompt, own]) if number else own)
                offset += length
        seen = [len(span) for span in keys]

        def ends(lengths: list[int]) -> torch.Tensor:
            return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)).to(device)

        repeated = sum(seen) > offset
        index = torch.from_numpy(np.concatenate(keys)).to(device) if repeated else None
        return Spans(ends(queries), ends(seen), int(max(queries)), max(seen), index)


@dataclass
class Padded:
    """Trees padded to the longest, for masked attention.

    queries: of a stripe. keys: of all positions, in the order in which the stripes are gathered.
    visible: bool [n, 1, queries of a tree, keys of a tree]. causal: it is nothing but causal, for every position.
    """

    queries: Slots
    keys: Slots
    visible: torch.Tensor
    causal: bool

    @staticmethod
    def of(trees: list[Tree], device: torch.device, stripe: Stripe) -> Padded:
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

        slots = (Slots(put(padded), put(inverse)) for padded, inverse in (query_slots, key_slots))
        causal = stripe.size == 1 and all(tree.segments[-1] <= 1 for tree in trees)
        return Padded(*slots, put(visible[:, None]), causal)


class Layout:
    """How the positions of a stripe attend to all T positions of their micro-batch.

    positions: int64 [T / size], for the rotary embedding; rotation: its cosines and sines there, set by the LayoutTable.
    """

    rotation: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, trees: list[Tree], device: torch.device, stripe: Stripe = WHOLE) -> None:
        self._trees, self._device, self.stripe = trees, device, stripe
        positions = torch.from_numpy(np.concatenate([tree.positions for tree in trees]))
        self.positions = stripe.of(positions).to(device)

    @cached_property
    def spans(self) -> Spans:
        """For flash attention over a whole micro-batch."""
        return Spans.of(self._trees, self._device)

    @cached_property
    def padded(self) -> Padded:
        return Padded.of(self._trees, self._device, self.stripe)


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
    """The layouts of the step that is running, by number. frequencies: float32 [head_dim / 2], of the rotary embedding."""

    def __init__(self, frequencies: torch.Tensor, dtype: torch.dtype) -> None:
        self._frequencies, self._dtype = frequencies, dtype
        self._layouts: list[Layout] = []

    def add(self, layout: Layout) -> torch.Tensor:
        """The layout's number, to be passed as attention_mask."""
        angles = torch.outer(layout.positions.float(), self._frequencies).repeat(1, 2)[:, None]
        layout.rotation = (angles.cos().to(self._dtype), angles.sin().to(self._dtype))
        self._layouts.append(layout)
        return torch.tensor(len(self._layouts) - 1)

    def get(self, number: torch.Tensor) -> Layout:
        return self._layouts[int(number)]

    def clear(self) -> None:
        self._layouts.clear()
