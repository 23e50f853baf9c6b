"""On-policy distillation: the student samples, the teacher scores what it sampled."""

from __future__ import annotations

import torch

from postroad_trainer.algorithms.errors import NotFiniteError
from postroad_trainer.algorithms.segments import Segments


def distilled_advantages(
    advantage_N: torch.Tensor,
    reverse_kl_N: torch.Tensor,
    segments: Segments,
    coefficient: float,
    reward_weight: float = 1.0,
) -> torch.Tensor:
    """[N]: reward_weight A - coefficient reverse_kl, 0 at masked tokens; before whitening.

    reverse_kl is student - teacher at the sampled token, the k1 estimate of KL(student || teacher), with the student's stored
    scores that anchor the ratio. reward_weight 0 is pure distillation, in which rewards are not needed
    (Lu et al. 2025, "On-Policy Distillation", Thinking Machines; Agarwal et al. 2023, GKD, arXiv:2306.13649, §3;
    Gu et al. 2023, MiniLLM, arXiv:2306.08543). Raises NotFiniteError where a trained token has no finite reverse KL.
    """
    penalty_N = segments.masked(reverse_kl_N.detach())
    if not torch.isfinite(penalty_N).all():
        raise NotFiniteError(
            "a reverse KL to the teacher is not finite; does the teacher share the student's vocabulary?"
        )
    return reward_weight * segments.masked(advantage_N) - coefficient * penalty_N
