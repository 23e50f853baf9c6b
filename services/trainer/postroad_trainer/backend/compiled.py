"""Element-wise work in one kernel on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled by torch at its first call with a GPU tensor in front; on the CPU it is called as it is."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        return (compiled() if first.is_cuda else function)(first, *rest)

    return call
