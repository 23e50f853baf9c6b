"""Returns of token rewards: REINFORCE++ and its baseline."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, NotFiniteError
from postroad_trainer.algorithms.segments import Segments, places

CHUNK = 128


def discounted_sums(x_SL: torch.Tensor, decay: float) -> torch.Tensor:
    """y_t = x_t + decay y_(t+1) along the last dimension, [S, L], y after the end = 0.

    A chunk is one product with a triangular matrix of powers, chunks are carried one to the next: L / 128 steps
    instead of L.
    """
    if not 0 <= decay <= 1:
        raise AlgorithmError(f"the decay is {decay}; discount and GAE lambda must be in [0, 1]")
    samples, length = x_SL.shape
    chunks = -(-length // CHUNK)
    backwards = torch.nn.functional.pad(x_SL.flip(1), (0, chunks * CHUNK - length)).view(samples, chunks, CHUNK)
    place_C = torch.arange(CHUNK, device=x_SL.device)
    distance_CC = place_C[None] - place_C[:, None]
    power_CC = torch.where(distance_CC >= 0, decay ** distance_CC.clamp(min=0).to(x_SL.dtype), 0.0)
    within = backwards @ power_CC
    power_C = decay ** (place_C + 1).to(x_SL.dtype)
    carry_S = x_SL.new_zeros(samples)
    parts = []
    for chunk in range(chunks):
        parts.append(within[:, chunk] + carry_S[:, None] * power_C)
        carry_S = parts[-1][:, -1]
    return torch.cat(parts, 1)[:, :length].flip(1) if parts else x_SL.clone()


def packed_discounted_sums(x_N: torch.Tensor, segments: Segments, chosen_N: torch.Tensor, decay: float) -> torch.Tensor:
    """discounted_sums within each sample over its chosen tokens only, [N], 0 elsewhere. Samples must be whole here."""
    rows = segments.sample_N[chosen_N]
    if not len(rows):
        return torch.zeros_like(x_N)
    columns = places(rows, segments.samples)
    padded_SL = x_N.new_zeros(segments.samples, int(columns.max()) + 1)
    padded_SL[rows, columns] = x_N[chosen_N]
    result_N = torch.zeros_like(x_N)
    result_N[chosen_N] = discounted_sums(padded_SL, decay)[rows, columns]
    return result_N


def reinforce_plus_plus_returns(
    reward_S: torch.Tensor, kl_N: torch.Tensor, segments: Segments, kl_coefficient: float, discount: float
) -> torch.Tensor:
    """REINFORCE++'s advantages before whitening, float32 [N].

    rho_t = -kl_coefficient kl_t, plus the sample's reward at its last trained token; A_t = rho_t + discount A_(t+1)
    (Hu et al. 2025, arXiv:2501.03262; k from kl_estimate(old, reference), 0 without a reference).
    The recursion runs over all response tokens: masked ones take part with their kl and one discount each, so kl must be
    finite everywhere. The reward of a sample without a trained token has no place and is dropped. Samples must be whole
    on this rank; whiten afterwards. Raises NotFiniteError for reward or kl.
    """
    _require_finite(reward_S, kl_N)
    rho_N = -kl_coefficient * kl_N.double() + torch.where(segments.last(), segments.spread(reward_S.double()), 0.0)
    everything_N = torch.ones_like(segments.mask_N)
    return packed_discounted_sums(rho_N, segments, everything_N, discount).float()


def reinforce_baseline_advantages(
    centred_S: torch.Tensor, kl_N: torch.Tensor, segments: Segments, kl_coefficient: float
) -> torch.Tensor:
    """REINFORCE++-baseline's advantages before whitening, float32 [N]: A_t = (r - mean of its group) - kl_coefficient kl_t.

    Hu et al. 2025, arXiv:2501.03262. centred_S comes from group_advantages(normalise_std=False). Local to a token, so it
    works on context-parallel parts. Raises NotFiniteError.
    """
    kl_N = segments.masked(kl_N)
    _require_finite(centred_S, kl_N)
    return (segments.spread(centred_S.double()) - kl_coefficient * kl_N.double()).float()


def _require_finite(reward_S: torch.Tensor, kl_N: torch.Tensor) -> None:
    if not torch.isfinite(reward_S).all():
        raise NotFiniteError("a reward is not finite; a failed grader is an error to retry, never a reward")
    if not torch.isfinite(kl_N).all():
        raise NotFiniteError(
            "a per-token KL is not finite; check the old and reference log-probabilities of the samples"
        )
