"""Packed tokens: which sample each one belongs to and which of them are trained.

Shape suffixes of this package: N packed response tokens of some samples, S samples, E executions, G groups,
P pairs, K candidates at a token, V vocabulary. A function that needs more than one token of a sample takes Segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from postroad_trainer.algorithms.errors import AlgorithmError

Reduce = Callable[[torch.Tensor], torch.Tensor]


def alone(partial: torch.Tensor) -> torch.Tensor:
    """The reduction of a process group of one."""
    return partial


@dataclass(frozen=True, eq=False)
class Segments:
    """N packed response tokens of S samples.

    sample_N: int64 in [0, samples), the tokens of a sample in their order (samples may interleave).
    mask_N: bool, True where the token is trained. What a masked token holds never reaches a result or a gradient
    of this package (NaN included), except where a docstring says that masked tokens take part.
    reduce: sums a tensor over the ranks that hold the other tokens of these samples (context parallelism) and is a
    collective: every rank calls it equally often. Where a gradient flows through a sum (GSPO, DPO) its backward must
    be a sum over the same ranks too, as in torch.distributed.nn.functional.all_reduce. All ranks number samples alike.
    Sums are index_add, exact again on CUDA under torch.use_deterministic_algorithms.
    """

    sample_N: torch.Tensor
    mask_N: torch.Tensor
    samples: int
    reduce: Reduce = alone

    def __post_init__(self) -> None:
        if self.sample_N.ndim != 1 or self.sample_N.shape != self.mask_N.shape:
            raise AlgorithmError(
                f"sample_N {tuple(self.sample_N.shape)} and mask_N {tuple(self.mask_N.shape)} must be one [N] each"
            )
        if self.mask_N.dtype != torch.bool or self.sample_N.dtype != torch.int64:
            raise AlgorithmError(
                f"mask_N is {self.mask_N.dtype}, sample_N {self.sample_N.dtype}; bool and int64 expected"
            )

    @staticmethod
    def of_lengths(lengths: list[int], mask_N: torch.Tensor, reduce: Reduce = alone) -> Segments:
        """Samples of these lengths, one behind the other."""
        counts = torch.tensor(lengths, dtype=torch.int64, device=mask_N.device)
        sample_N = torch.repeat_interleave(torch.arange(len(lengths), device=mask_N.device), counts)
        return Segments(sample_N, mask_N, len(lengths), reduce)

    def masked(self, x_N: torch.Tensor) -> torch.Tensor:
        """x where the token is trained, 0 elsewhere; no gradient reaches the rest."""
        if x_N.shape != self.mask_N.shape:
            raise AlgorithmError(
                f"{tuple(x_N.shape)} values for {len(self.mask_N)} tokens; one value per token expected"
            )
        return torch.where(self.mask_N, x_N, torch.zeros((), dtype=x_N.dtype, device=x_N.device))

    def sums(self, x_N: torch.Tensor) -> torch.Tensor:
        """[S] sums over the trained tokens of each sample, over all ranks of `reduce`."""
        zeros = torch.zeros(self.samples, dtype=x_N.dtype, device=x_N.device)
        return self.reduce(zeros.index_add(0, self.sample_N, self.masked(x_N)))

    def counts(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[S] trained tokens of each sample, over all ranks of `reduce`."""
        return self.sums(torch.ones(len(self.mask_N), dtype=dtype, device=self.mask_N.device))

    def means(self, x_N: torch.Tensor) -> torch.Tensor:
        """[S] means over the trained tokens of each sample; 0 for a sample without any."""
        return self.sums(x_N) / self.counts(x_N.dtype).clamp(min=1)

    def spread(self, x_S: torch.Tensor) -> torch.Tensor:
        """[N], the value of each token's sample."""
        return x_S[self.sample_N]

    def last(self) -> torch.Tensor:
        """bool [N]: the last trained token of each sample. Local: the samples must be whole on this rank."""
        place_N = torch.arange(1, len(self.sample_N) + 1, device=self.sample_N.device) * self.mask_N
        last_S = torch.zeros(self.samples, dtype=torch.int64, device=self.sample_N.device)
        last_S = last_S.scatter_reduce(0, self.sample_N, place_N, "amax")
        return self.mask_N & (place_N == self.spread(last_S))


def places(sample_N: torch.Tensor, samples: int) -> torch.Tensor:
    """int64 [N]: how many tokens of the same sample come before each one."""
    order_N = torch.argsort(sample_N, stable=True)
    counts_S = torch.bincount(sample_N, minlength=samples)
    starts_S = counts_S.cumsum(0) - counts_S
    place_N = torch.empty_like(sample_N)
    place_N[order_N] = torch.arange(len(sample_N), device=sample_N.device) - starts_S[sample_N[order_N]]
    return place_N
