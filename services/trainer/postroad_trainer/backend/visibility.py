"""How the positions of a micro-batch see each other, as tensors for the attention and the rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from postroad_trainer.backend.layout import PROMPT, Tree
from postroad_trainer.backend.settings import BackendError


@dataclass
class Layout:
    """How the T positions of a micro-batch attend. n trees, padded to P positions for attention alone.

    positions: int64 [T]. padded: int64 [n*P], the position in each slot (0 in empty ones). slots: int64 [T], its
    inverse. visible: bool [n, 1, P, P]; an empty slot sees only itself.
    """

    positions: torch.Tensor
    padded: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor

    @staticmethod
    def of(trees: list[Tree], device: torch.device) -> Layout:
        longest = max(map(len, trees))
        segments = np.full((len(trees), longest), -1, np.int64)
        padded = np.zeros((len(trees), longest), np.int64)
        slots, offset = [], 0
        for number, tree in enumerate(trees):
            length = len(tree)
            segments[number, :length] = tree.segments
            padded[number, :length] = np.arange(offset, offset + length)
            slots.append(np.arange(length) + number * longest)
            offset += length
        query, key = segments[:, :, None], segments[:, None, :]
        visible = ((key == PROMPT) | (key == query)) & np.tri(longest, dtype=bool) & (key >= 0) & (query >= 0)
        visible |= np.eye(longest, dtype=bool)
        arrays = (
            np.concatenate([tree.positions for tree in trees]),
            padded.reshape(-1),
            np.concatenate(slots),
            visible[:, None],
        )
        return Layout(*(torch.from_numpy(array).to(device) for array in arrays))


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
