"""On-policy distillation: the student samples, the teacher scores what it sampled."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, NotFiniteError, NothingTrainedError
from postroad_trainer.algorithms.segments import Segments

CandidateWeight = Literal["student", "teacher", "uniform", "raw"]


def distilled_advantages(
    advantage_N: torch.Tensor,
    reverse_kl_N: torch.Tensor,
    segments: Segments,
    coefficient: float,
    reward_weight: float = 1.0,
) -> torch.Tensor:
    """[N]: reward_weight A - coefficient reverse_kl, 0 at masked tokens; before whitening.

    reverse_kl is reverse_kl_of_samples or candidate_reverse_kl. reward_weight 0 is pure distillation, in which rewards are not
    needed (Lu et al. 2025, "On-Policy Distillation", Thinking Machines; Agarwal et al. 2023, GKD, arXiv:2306.13649, §3;
    Gu et al. 2023, MiniLLM, arXiv:2306.08543). Raises NotFiniteError where a trained token has no finite reverse KL.
    """
    penalty_N = segments.masked(reverse_kl_N.detach())
    if not torch.isfinite(penalty_N).all():
        raise NotFiniteError(
            "a reverse KL to the teacher is not finite; does the teacher share the student's vocabulary?"
        )
    return reward_weight * segments.masked(advantage_N) - coefficient * penalty_N


def reverse_kl_of_samples(student_N: torch.Tensor, teacher_N: torch.Tensor) -> torch.Tensor:
    """[N]: student - teacher at the sampled token, the k1 estimate of KL(student || teacher). Detached.

    student: the stored scores that anchor the ratio.
    """
    return (student_N - teacher_N).detach()


def candidate_reverse_kl(
    student_NK: torch.Tensor,
    teacher_NK: torch.Tensor,
    candidate_NK: torch.Tensor,
    weighting: CandidateWeight = "student",
) -> torch.Tensor:
    """[N]: sum over candidates of w (student - teacher) where K candidate tokens (the top ones) were scored by both.

    candidate_NK: bool, which entries are candidates. w: softmax over the candidates of the student's scores, of the
    teacher's, 1 / their number, or raw student probabilities without renormalisation. Detached.
    Raises NothingTrainedError for a token without a candidate: mask it by giving it one.
    """
    if weighting not in get_args(CandidateWeight):
        raise AlgorithmError(f"weighting is {weighting!r}; one of {', '.join(get_args(CandidateWeight))} expected")
    if not bool(candidate_NK.any(1).all()):
        raise NothingTrainedError(
            "a token has no candidate that student and teacher both scored; use the sampled token"
        )
    student_NK = torch.where(candidate_NK, student_NK.detach(), -torch.inf)
    teacher_NK = torch.where(candidate_NK, teacher_NK.detach(), -torch.inf)
    weight_NK = {
        "student": student_NK.softmax(1),
        "teacher": teacher_NK.softmax(1),
        "uniform": candidate_NK / candidate_NK.sum(1, keepdim=True),
        "raw": student_NK.exp(),
    }[weighting]
    return torch.where(candidate_NK, weight_NK * (student_NK - teacher_NK), 0.0).sum(1)
