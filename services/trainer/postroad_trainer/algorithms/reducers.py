"""How per-token losses become one number: the weight of a token in the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, NothingTrainedError
from postroad_trainer.algorithms.segments import Segments
from postroad_trainer.batch import Reducer


def reduction_weights(
    trained_S: torch.Tensor, execution_S: torch.Tensor, reducer: Reducer, constant_length: int | None = None
) -> torch.Tensor:
    """float64 [S]: the weight of each trained token of each sample; loss = sum over samples and tokens of weight x loss.

    token: 1 / all trained tokens of the step (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8);
    sample: 1 / (executions x trained tokens of the sample's execution), so that all samples of one execution form one
    token-weighted mean (GRPO, Shao et al. 2024, arXiv:2402.03300, eq. 3, with one sample per execution);
    constant: 1 / (executions x constant_length) (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783).
    trained_S (tokens before any rejection) and execution_S (integers, one name each over the whole step) describe the
    WHOLE step: weights then stay right wherever a sample is computed, and the losses of all micro-batches and ranks add up.
    A sample without a trained token has no token to weigh, but its execution counts.
    Raises NothingTrainedError where the step trains nothing.
    """
    if reducer not in get_args(Reducer):
        raise AlgorithmError(f"reducer is {reducer!r}; one of {', '.join(get_args(Reducer))} expected")
    if trained_S.ndim != 1 or trained_S.shape != execution_S.shape:
        raise AlgorithmError(
            f"trained tokens {tuple(trained_S.shape)} and executions {tuple(execution_S.shape)} must be one [S] each"
        )
    trained = trained_S.double()
    if not bool(trained.sum() > 0):
        raise NothingTrainedError("no token of the step is trained; skip the step")
    names, index_S = execution_S.unique(return_inverse=True)
    if reducer == "token":
        return torch.full_like(trained, 1.0) / trained.sum()
    if reducer == "sample":
        trained_E = trained.new_zeros(len(names)).index_add(0, index_S, trained)
        return 1.0 / (len(names) * trained_E[index_S].clamp(min=1))
    if constant_length is None or constant_length < 1:
        raise AlgorithmError("the constant reducer needs constant_length, a number of tokens of at least 1")
    return torch.full_like(trained, 1.0) / (len(names) * constant_length)


def reduced(x_N: torch.Tensor, weight_S: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Scalar: the sum over this part's trained tokens of weight x value. Parts of a step add up, with gradients."""
    return (segments.masked(x_N) * segments.spread(weight_S).to(x_N.dtype)).sum()


def token_weights(trained_tokens: Sequence[int], reducer: Reducer, constant_length: int | None = None) -> list[float]:
    """reduction_weights of rows that are one execution each and have a trained token each.

    Rows count here even when they are not run because their advantage is 0.
    """
    if not trained_tokens or min(trained_tokens) < 1:
        raise NothingTrainedError("every row needs at least one trained token before the loss can be reduced")
    trained_S = torch.tensor(trained_tokens, dtype=torch.int64)
    return reduction_weights(trained_S, torch.arange(len(trained_S)), reducer, constant_length).tolist()
