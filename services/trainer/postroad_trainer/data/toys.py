"""Tiny generated tasks for models that start from random weights: copy or sort a few digits."""

from __future__ import annotations

from typing import Any

import numpy as np


def copy_digits(length: int = 4, size: int = 1000, seed: int = 1) -> list[dict[str, Any]]:
    """`size` rows that ask for the same `length` digits again; the label is those digits."""
    return [{"prompt": digits, "label": digits} for digits in _digits(length, size, seed)]


def sort_digits(length: int = 4, size: int = 1000, seed: int = 1) -> list[dict[str, Any]]:
    """`size` rows that ask for `length` digits in rising order."""
    return [{"prompt": digits, "label": "".join(sorted(digits))} for digits in _digits(length, size, seed)]


def _digits(length: int, size: int, seed: int) -> list[str]:
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(0, 10, size=(size, length))
    return ["".join(map(str, row)) for row in drawn]
