"""How per-token losses become one number: the weight of a token in the sum."""

from __future__ import annotations

import torch

from postroad.config.algorithm import AlgorithmSection
from postroad_trainer.algorithms.errors import AlgorithmError, NothingTrainedError
from postroad_trainer.algorithms.segments import Segments


def reduction_weights(trained_S: torch.Tensor, execution_S: torch.Tensor, settings: AlgorithmSection) -> torch.Tensor:
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
    if trained_S.ndim != 1 or trained_S.shape != execution_S.shape:
        raise AlgorithmError(
            f"trained tokens {tuple(trained_S.shape)} and executions {tuple(execution_S.shape)} must be one [S] each"
        )
    trained = trained_S.double()
    if not bool(trained.sum() > 0):
        raise NothingTrainedError("no token of the step is trained; skip the step")
    names, index_S = execution_S.unique(return_inverse=True)
    if settings.reducer == "token":
        return torch.full_like(trained, 1.0) / trained.sum()
    if settings.reducer == "sample":
        trained_E = trained.new_zeros(len(names)).index_add(0, index_S, trained)
        return 1.0 / (len(names) * trained_E[index_S].clamp(min=1))
    if settings.constant_length is None:
        raise AlgorithmError("the constant reducer needs constant_length, a number of tokens of at least 1")
    return torch.full_like(trained, 1.0) / (len(names) * settings.constant_length)


def reduced(x_N: torch.Tensor, weight_S: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Scalar: the sum over this part's trained tokens of weight x value. Parts of a step add up, with gradients."""
    return (segments.masked(x_N) * segments.spread(weight_S).to(x_N.dtype)).sum()
