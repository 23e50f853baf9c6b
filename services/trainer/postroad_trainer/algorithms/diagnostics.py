"""How far two policies are apart, by sample: effective sample size and the mismatch of engine and trainer."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.divergences import kl_k3
from postroad_trainer.algorithms.ratios import bounded_ratio
from postroad_trainer.algorithms.segments import Segments


def effective_sample_size(weight_N: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[S]: (sum w)^2 / (n sum w^2) over the n trained tokens of each sample; 1 on policy (Kong 1992).

    A sample without trained tokens, or with all weights 0, has 0.
    """
    total_S = segments.sums(weight_N)
    squares_S = segments.sums(weight_N.square())
    return total_S.square() / (segments.counts(weight_N.dtype) * squares_S).clamp(min=1e-8)


def mismatch(trainer_N: torch.Tensor, engine_N: torch.Tensor, segments: Segments) -> dict[str, torch.Tensor]:
    """name -> [S], by sample over its trained tokens (0 without any); x = trainer - engine.

    trainer_log_perplexity, engine_log_perplexity: -mean log-probability. log_perplexity_difference: their difference;
    perplexity_ratio: its exponential. kl: mean of -x = KL(engine || trainer) by k1; kl_k3. abs_difference: mean |x|.
    chi2_token: mean exp(2x) - 1; chi2_sequence: exp(2 sum x) - 1.
    Names and formulas after Liu et al. 2025, "When Speed Kills Stability".
    """
    trainer_N, engine_N = segments.masked(trainer_N.detach()), segments.masked(engine_N)
    log_ratio_N = trainer_N - engine_N
    trainer_S, engine_S = -segments.means(trainer_N), -segments.means(engine_N)
    trained_S = segments.counts() > 0
    return {
        "trainer_log_perplexity": trainer_S,
        "engine_log_perplexity": engine_S,
        "log_perplexity_difference": trainer_S - engine_S,
        "perplexity_ratio": bounded_ratio(trainer_S - engine_S),
        "kl": -segments.means(log_ratio_N),
        "kl_k3": segments.means(kl_k3(engine_N, trainer_N)),
        "abs_difference": segments.means(log_ratio_N.abs()),
        "chi2_token": torch.where(trained_S, segments.means(bounded_ratio(2 * log_ratio_N)) - 1, 0.0),
        "chi2_sequence": bounded_ratio(2 * segments.sums(log_ratio_N)) - 1,
    }
