"""Numbers of a batch that need no model: rewards, lengths, staleness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postroad.messages import Sample


def batch_metrics(groups: Sequence[Sequence[Sample]], version: int) -> dict[str, float]:
    """reward_mean and reward_std over samples; reward_std_in_group is the mean over groups; lengths are in response
    tokens; staleness is the trainer's version minus the oldest version of a sample's tokens."""
    rewards = np.array([[sample.reward for sample in samples] for samples in groups], dtype=np.float64)
    trajectories = [sample.trajectory for samples in groups for sample in samples]
    lengths = np.array([int(trajectory.loss_mask.sum()) for trajectory in trajectories])
    staleness = np.array([version - trajectory.oldest_version for trajectory in trajectories])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_std_in_group": float(rewards.std(axis=1).mean()),
        "groups_with_equal_rewards": float((rewards.max(axis=1) == rewards.min(axis=1)).mean()),
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([t.finish_reason == "length" for t in trajectories])),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
        "generation_seconds_mean": float(np.mean([t.seconds for t in trajectories])),
    }
