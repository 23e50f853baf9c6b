"""The numbers of a step. docs/algorithms.md says what each means; a test holds the two together."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from postroad.messages import Sample
from postroad_trainer.algorithms import Segments
from postroad_trainer.algorithms.diagnostics import effective_sample_size, mismatch
from postroad_trainer.algorithms.ratios import bounded_ratio
from postroad_trainer.batch import StepResult, TrainRow

QUARTERS = 4
# Dense bfloat16 FLOP/s of the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "L40": 181e12}


@dataclass(frozen=True)
class Trained:
    """A step's batch beside what became of it: samples and rows in one order, and the version that it trained."""

    groups: Sequence[Sequence[Sample]]
    rows: Sequence[TrainRow]
    result: StepResult
    version: int

    @property
    def samples(self) -> list[Sample]:
        return [sample for members in self.groups for sample in members]


def step_metrics(trained: Trained, flops_per_token: float) -> dict[str, float]:
    """All of them, flat; what is not known is left out."""
    numbers = {
        **_result(trained.result), **_rewards(trained.groups), **_lengths(trained.samples),
        **_staleness(trained), **_advantages(trained.rows), **_agreement(trained), **_teacher(trained),
        **_speed(trained.result, flops_per_token), **_memory(),
    }  # fmt: skip
    known = {name: float(value) for name, value in numbers.items() if value is not None}
    return {name: value for name, value in known.items() if math.isfinite(value)}


def _result(result: StepResult) -> dict[str, Any]:
    names = (
        "loss", "grad_norm", "skipped", "gradients_not_finite", "rows", "rows_skipped", "rows_masked", "tokens",
        "trained_tokens", "computed_tokens", "prompts_not_shared", "experts_differ_fraction", "entropy",
        "experts_unknown", "rows_unrouted",
    )  # fmt: skip
    run = result.sums.get("trained", 0.0)
    means = {"policy_loss": "policy_loss", "clipped": "clip_fraction", "rejected": "rejected_fraction",
             "ratio": "ratio_mean", "correction_weight": "correction_weight_mean", "kl_reference": "kl_reference"}  # fmt: skip
    sums = {mean: result.sums[name] / run for name, mean in means.items()} if run else {}
    seconds = {f"seconds_{phase}": seconds for phase, seconds in result.seconds.items()}
    return {name: getattr(result, name) for name in names} | sums | seconds


def _rewards(groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    by_group = [np.array([sample.reward for sample in members], dtype=np.float64) for members in groups]
    means = np.array([rewards.mean() for rewards in by_group])
    every = np.concatenate(by_group)
    by_source: dict[str, list[float]] = {}
    for members in groups:
        for sample in members:
            metadata = sample.trajectory.task.reward.metadata
            if isinstance(source := metadata.get("source", metadata.get("task")), str):
                by_source.setdefault(source, []).append(sample.reward)
    return {
        "reward_mean": every.mean(), "reward_std": every.std(), "reward_min": every.min(), "reward_max": every.max(),
        "reward_std_in_group": np.mean([rewards.std() for rewards in by_group]),
        "reward_of_worst_group": means.min(), "reward_of_best_group": means.max(),
        "groups_with_equal_rewards": np.mean([rewards.max() == rewards.min() for rewards in by_group]),
        **{f"reward_mean_of_{source}": np.mean(rewards) for source, rewards in by_source.items()},
    }  # fmt: skip


def _lengths(samples: list[Sample]) -> dict[str, Any]:
    responses = np.array([int(sample.trajectory.loss_mask.sum()) for sample in samples])
    prompts = np.array([int(np.argmax(sample.trajectory.loss_mask)) for sample in samples])
    return {
        "response_tokens_mean": responses.mean(), "response_tokens_max": responses.max(),
        "response_tokens_min": responses.min(), "response_tokens_median": np.median(responses),
        "prompt_tokens_mean": prompts.mean(),
        "truncated_fraction": np.mean([sample.trajectory.finish_reason == "length" for sample in samples]),
        "generation_seconds_mean": np.mean([sample.trajectory.seconds for sample in samples]),
    }  # fmt: skip


def staleness_of(sample: Sample, version: int) -> np.ndarray:
    """int64 [T]: how many versions before `version` each token was generated; 0 where nothing was."""
    staleness = np.zeros(len(sample.trajectory.tokens), np.int64)
    for span in sample.trajectory.versions:
        staleness[span.start : span.end] = version - span.version
    return staleness


def _staleness(trained: Trained) -> dict[str, Any]:
    oldest = np.array([trained.version - sample.trajectory.oldest_version for sample in trained.samples])
    tokens = np.concatenate(
        [staleness_of(sample, trained.version)[sample.trajectory.loss_mask.astype(bool)] for sample in trained.samples]
    )
    ages, counts = np.unique(tokens, return_counts=True)
    histogram = {f"staleness_{age}_fraction": count / len(tokens) for age, count in zip(ages, counts, strict=True)}
    mixed = np.mean([len({span.version for span in s.trajectory.versions}) > 1 for s in trained.samples])
    return {
        "staleness_mean": oldest.mean(),
        "staleness_max": oldest.max(),
        "mixed_versions_fraction": mixed,
    } | histogram


def _advantages(rows: Sequence[TrainRow]) -> dict[str, Any]:
    tokens = np.concatenate([np.broadcast_to(row.advantage, row.tokens.shape)[row.trained] for row in rows])
    if not len(tokens):
        return {}
    return {
        "advantage_mean": tokens.mean(dtype=np.float64), "advantage_std": tokens.std(dtype=np.float64),
        "advantage_min": tokens.min(), "advantage_max": tokens.max(), "advantage_zero_fraction": np.mean(tokens == 0),
    }  # fmt: skip


def _agreement(trained: Trained) -> dict[str, Any]:
    """Engine and trainer on the tokens that were run, of samples that an engine made."""
    scores = trained.result.scores or [None] * len(trained.rows)  # nothing was run
    run = [
        (row, score[0], staleness_of(sample, trained.version))
        for row, score, sample in zip(trained.rows, scores, trained.samples, strict=True)
        if score is not None and sample.trajectory.engine
    ]
    if not run:
        return {}
    trainer = np.concatenate([score[row.trained] for row, score, _ in run])
    engine = np.concatenate([row.logprobs[row.trained] for row, _, _ in run])
    age = np.concatenate([staleness[row.trained] for row, _, staleness in run])
    place = np.concatenate([_quarters(row)[row.trained] for row, _, _ in run])
    difference = np.abs(trainer - engine)
    lengths = [int(row.loss_mask.sum()) for row, _, _ in run]
    segments = Segments.of_lengths(lengths, torch.ones(len(trainer), dtype=torch.bool))
    trainer_N, engine_N = torch.from_numpy(trainer), torch.from_numpy(engine)
    by_sample = mismatch(trainer_N, engine_N, segments)
    names = ("kl", "kl_k3", "perplexity_ratio", "chi2_token", "chi2_sequence")
    weight_N = bounded_ratio(trainer_N - engine_N)
    return {
        "logprob_abs_diff_mean": difference.mean(dtype=np.float64), "logprob_abs_diff_max": difference.max(),
        "logprob_abs_diff_p99": np.quantile(difference, 0.99),
        **{f"logprob_abs_diff_mean_staleness_{a}": difference[age == a].mean() for a in np.unique(age)},
        **{f"logprob_abs_diff_mean_quarter_{q + 1}": difference[place == q].mean() for q in np.unique(place)},
        "engine_ratio_mean": weight_N.mean(), "engine_ratio_max": weight_N.max(),
        "effective_sample_size": effective_sample_size(weight_N, segments).mean(),
        **{f"engine_{name}": by_sample[name].mean() for name in names},
    }  # fmt: skip


def _teacher(trained: Trained) -> dict[str, Any]:
    run = [
        (score[0] - row.scores["teacher"])[row.trained]
        for row, score in zip(trained.rows, trained.result.scores, strict=False)
        if score is not None and "teacher" in row.scores
    ]
    return {"teacher_reverse_kl": np.concatenate(run).mean(dtype=np.float64)} if run else {}


def _quarters(row: TrainRow) -> np.ndarray:
    """int64 [T]: in which quarter of its response each trained token is, from 0."""
    count = int(row.loss_mask.sum())
    place = np.cumsum(row.loss_mask, dtype=np.int64) - 1
    return np.clip(place * QUARTERS // max(count, 1), 0, QUARTERS - 1)


def _speed(result: StepResult, flops_per_token: float) -> dict[str, Any]:
    seconds = result.seconds.get("forward_backward", 0.0) + result.seconds.get("optimizer", 0.0)
    if not seconds:
        return {}
    rate = result.computed_tokens / seconds
    return {"tokens_per_second": rate, "mfu": rate * flops_per_token / peak if (peak := peak_flops()) else None}


def peak_flops() -> float | None:
    """Of all ranks' devices together; None where it isn't known, such as on a CPU."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    device = torch.cuda.get_device_name()
    known = next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
    return None if known is None else known * torch.distributed.get_world_size()


def flops_per_token(values: dict[str, Any], length: int) -> float:
    """Of a forward and backward pass, by a model of this config.json: 6 for each weight that a token meets, and attention to
    half of `length` tokens (Narayanan et al. 2021, arXiv:2104.04473, appendix; recompute does not count)."""
    hidden, layers, heads = values["hidden_size"], values["num_hidden_layers"], values["num_attention_heads"]
    head = values.get("head_dim") or hidden // heads
    attention = hidden * head * (2 * heads + 2 * values.get("num_key_value_heads", heads))
    experts = values.get("num_experts")
    if experts:
        mlp = 3 * hidden * values["moe_intermediate_size"] * values["num_experts_per_tok"] + hidden * experts
    else:
        mlp = 3 * hidden * values["intermediate_size"]
    return float(6 * (layers * (attention + mlp) + hidden * values["vocab_size"]) + 6 * layers * heads * head * length)


def _memory() -> dict[str, Any]:
    """Peaks: of this process on the host since its start, of the device since the last step."""
    numbers: dict[str, Any] = {"memory_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}
    if torch.cuda.is_available() and torch.version.cuda is not None:
        numbers["memory_device_gib"] = torch.cuda.max_memory_allocated() / 1024**3
        torch.cuda.reset_peak_memory_stats()
    return numbers
