"""Advantages from the rewards of a group, each execution counted once.

An execution is one attempt of the agent. Compaction, forks and sub-agents make several samples of it, which share its
reward: they are one draw from the policy, so statistics run over executions and every sample gets its execution's value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from postroad_trainer.algorithms.errors import AlgorithmError, ExecutionRewardsError, NotFiniteError

EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class ExecutionRewards:
    """Rewards of E executions in G groups, from S samples. float64 and int64.

    reward_E, group_E in [0, groups); execution_S in [0, E) maps the samples back.
    """

    reward_E: torch.Tensor
    group_E: torch.Tensor
    execution_S: torch.Tensor
    groups: int

    @staticmethod
    def of(reward_S: torch.Tensor, group_S: torch.Tensor, execution_S: torch.Tensor | None = None) -> ExecutionRewards:
        """Any integers name groups and executions; an execution belongs to its group, so names may repeat elsewhere.

        execution_S None: every sample is an execution. Raises NotFiniteError for a reward that is not finite and
        ExecutionRewardsError where samples of one execution disagree.
        """
        if reward_S.ndim != 1 or group_S.shape != reward_S.shape:
            raise AlgorithmError(
                f"rewards {tuple(reward_S.shape)} and groups {tuple(group_S.shape)} must be one [S] each"
            )
        if not len(reward_S):
            raise AlgorithmError("there are no rewards; a step needs at least one sample")
        if not torch.isfinite(reward_S).all():
            raise NotFiniteError("a reward is not finite; a failed grader is an error to retry, never a reward")
        if execution_S is None:
            execution_S = torch.arange(len(reward_S), device=reward_S.device)
        pairs, execution_S = torch.stack([group_S, execution_S], 1).unique(dim=0, return_inverse=True)
        names, group_E = pairs[:, 0].unique(return_inverse=True)
        rewards = reward_S.double()
        reward_E = rewards.new_zeros(len(pairs)).index_copy(0, execution_S, rewards)
        different = (reward_E[execution_S] != rewards).nonzero().flatten().tolist()
        if different:
            sample = different[0]
            raise ExecutionRewardsError(
                f"sample {sample} has reward {float(reward_S[sample])}, another sample of its execution "
                f"{float(reward_E[execution_S[sample]])}; grade an execution once and give all its samples that reward"
            )
        return ExecutionRewards(reward_E, group_E, execution_S, len(names))

    def sizes(self) -> torch.Tensor:
        """[G] executions of each group, as float64."""
        return torch.bincount(self.group_E, minlength=self.groups).double()

    def centred(self) -> torch.Tensor:
        """[E] reward - mean of its group; exactly 0 where all rewards of the group are equal."""
        mean_G = self._sums(self.reward_E) / self.sizes()
        return torch.where(self.spread()[self.group_E], self.reward_E - mean_G[self.group_E], 0.0)

    def spread(self) -> torch.Tensor:
        """bool [G]: the rewards of the group are not all equal. Rounding of a mean can't fool it."""
        zeros_G = self.reward_E.new_zeros(self.groups)
        highest = zeros_G.scatter_reduce(0, self.group_E, self.reward_E, "amax", include_self=False)
        return highest > zeros_G.scatter_reduce(0, self.group_E, self.reward_E, "amin", include_self=False)

    def deviations(self) -> torch.Tensor:
        """[G] unbiased (n - 1) standard deviations; 0 for a group of one."""
        return (self._sums(self.centred().square()) / (self.sizes() - 1).clamp(min=1)).sqrt()

    def of_samples(self, x_E: torch.Tensor) -> torch.Tensor:
        """float32 [S]: each sample gets its execution's value."""
        return x_E[self.execution_S].float()

    def _sums(self, x_E: torch.Tensor) -> torch.Tensor:
        return x_E.new_zeros(self.groups).index_add(0, self.group_E, x_E)


def group_advantages(rewards: ExecutionRewards, normalise_std: bool = True) -> torch.Tensor:
    """GRPO's advantages, float32 [S]; GSPO, CISPO and DAPO use the same.

    A = (r - mean) / (std + 1e-6) over the executions of the group with the unbiased std (Shao et al. 2024,
    DeepSeekMath, arXiv:2402.03300, §4.1.2). Without normalise_std A = r - mean: Dr.GRPO (Liu et al. 2025,
    arXiv:2503.20783, §3), and the centred reward of REINFORCE++'s baseline.
    A group of one execution, or of equal rewards, has advantage exactly 0.
    """
    centred_E = rewards.centred()
    if normalise_std:
        deviation_G = torch.where(rewards.spread(), rewards.deviations() + EPSILON, 1.0)
        centred_E = centred_E / deviation_G[rewards.group_E]
    return rewards.of_samples(centred_E)


def leave_one_out_advantages(rewards: ExecutionRewards) -> torch.Tensor:
    """RLOO's advantages, float32 [S]: A_i = r_i - mean of the other executions of the group = n / (n - 1) (r_i - mean).

    Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740, §2 (after Kool et al. 2019).
    A group of one execution has no others and advantage exactly 0.
    """
    sizes_G = rewards.sizes()
    factor_G = sizes_G / (sizes_G - 1).clamp(min=1)
    return rewards.of_samples(rewards.centred() * factor_G[rewards.group_E])


def preference_advantages(rewards: ExecutionRewards, margin_S: torch.Tensor) -> torch.Tensor:
    """DPO's gradient as advantages, float32 [S]: sigmoid(-h) of the best of each group, -sigmoid(-h) of the worst, 0 else.

    h = margin of the best - margin of the worst, margin_S = beta (log p - log p of the reference) of the sample. The gradient
    of -log sigmoid(h) is -sigmoid(-h) that of h (Rafailov et al. 2023, arXiv:2305.18290, §4), so the loss -A log p times
    beta has the gradient of the mean of DPO's loss over pairs, with the factor executions / pairs that the reducer
    "constant" of length 1 divides out. A group of equal rewards is no pair.
    """
    advantage_E = torch.zeros_like(rewards.reward_E)
    margin_E = torch.zeros_like(rewards.reward_E).index_copy(0, rewards.execution_S, margin_S.double())
    groups = rewards.spread().nonzero().flatten().tolist()
    for group in groups:
        members = (rewards.group_E == group).nonzero().flatten()
        best, worst = members[rewards.reward_E[members].argmax()], members[rewards.reward_E[members].argmin()]
        slope = torch.sigmoid(margin_E[worst] - margin_E[best]) * len(rewards.reward_E) / len(groups)
        advantage_E[best], advantage_E[worst] = slope, -slope
    return rewards.of_samples(advantage_E)
