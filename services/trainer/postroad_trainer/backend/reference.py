"""The frozen reference model: the weights that a run began with, kept on the host and swapped in for its passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


class Reference:
    """A copy of `parameters` as they are now. They are this rank's own shards, whatever the layout."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it the parameters hold the reference, in place; afterwards their own values again, bit for bit."""
        own = [parameter.detach().to("cpu", copy=True) for parameter, _ in self._kept]
        try:
            self._put([kept for _, kept in self._kept])
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for (parameter, _), value in zip(self._kept, values, strict=True):
            parameter.copy_(value)
