"""The order in which prompts are drawn: a function of the seed, so that a restart goes on where it was."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation [size] of the rows in `epoch`: PCG64 seeded by (seed, epoch)."""
    permutation = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(size)
    permutation.flags.writeable = False
    return permutation


def prompt_index(seed: int, number: int, size: int, *, shuffle: bool = True) -> int:
    """The row of group `number` (from 0), over as many epochs as it takes; in file order without `shuffle`."""
    epoch, place = divmod(number, size)
    return int(order(seed, epoch, size)[place]) if shuffle else place
