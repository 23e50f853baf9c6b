"""Losses, divergences, entropy, SFT, DPO and distillation: tables, plain loops as a second opinion, properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postroad.config.algorithm import AlgorithmSection, DivergenceKind
from postroad_trainer.algorithms.distillation import distilled_advantages
from postroad_trainer.algorithms.divergences import kl_estimate
from postroad_trainer.algorithms.errors import AlgorithmError, MissingScoreError, NotFiniteError
from postroad_trainer.algorithms.groups import ExecutionRewards, preference_advantages
from postroad_trainer.algorithms.log_probabilities import LogProbabilities
from postroad_trainer.algorithms.losses import (
    clipped_policy_loss,
    clipped_weight_loss,
    sequence_policy_loss,
    weighted_loss,
)
from postroad_trainer.algorithms.reducers import reduced, reduction_weights
from postroad_trainer.algorithms.segments import Segments
from postroad_trainer.backend.log_probabilities import TokenLogProbabilities

FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 1 << 30)


def packed(seed: int) -> tuple[Segments, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segments of one to four samples, current and old log-probabilities and advantages equal within a sample."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator).tolist()
    mask_N = torch.rand(sum(lengths), generator=generator) < 0.7
    mask_N[0] = True
    segments = Segments.of_lengths(lengths, mask_N)
    old_N = -3 * torch.rand(sum(lengths), generator=generator)
    current_N = old_N + torch.randn(sum(lengths), generator=generator) / 3
    return segments, current_N, old_N, segments.spread(torch.randn(len(lengths), generator=generator))


def gradient_of(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> tuple[list[float], list[float]]:
    """The value of a function and the gradient of its sum."""
    point = at.clone().requires_grad_()
    value = function(point)
    (gradient,) = torch.autograd.grad(value.sum(), point)
    return value.detach().tolist(), gradient.tolist()


# Policy losses


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss"), [(2.0, -1.0, 3.0), (0.4, -1.0, 1.491825), (2.0, 1.0, -1.28), (-0.4, -1.0, 0.8)]
)
def test_dual_clip_table(log_ratio: float, advantage: float, loss: float) -> None:
    result = clipped_policy_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), 0.2, 0.28, 3.0)
    assert float(result.loss_N) == pytest.approx(loss, abs=1e-5)
    with pytest.raises(AlgorithmError, match="dual_clip"):
        clipped_policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), 0.2, 0.28, 1.0)


def test_sequence_ratio_table() -> None:
    current_N, old_N = torch.tensor([-1.0, -2, -3, -0.5]), torch.tensor([-1.1, -1.8, -3, -9])
    segments = Segments.of_lengths([4], torch.tensor([True, True, True, False]))
    value, slope = gradient_of(
        lambda x: sequence_policy_loss(x, old_N, torch.ones(4), segments, 0.2, 0.2).loss_N, current_N
    )
    assert value == pytest.approx([-0.967216] * 3 + [0], abs=1e-5)
    assert slope == pytest.approx([-0.967216] * 3 + [0], abs=1e-5)  # 3 tokens x 1/3 of the mean


def test_clipped_weight_table() -> None:
    # exp(0.5) = 1.648721 is clipped to 1.28 from above, exp(-0.5) = 0.606531 to 0.8 from below only where a bound is given
    current_N, old_N, advantage_N = (
        torch.tensor([-1.0, -1, -1]),
        torch.tensor([-1.5, -0.5, -1]),
        torch.tensor([1.0, 2, -1]),
    )
    value, slope = gradient_of(lambda x: clipped_weight_loss(x, old_N, advantage_N, None, 0.28).loss_N, current_N)
    assert value == pytest.approx([1.28, 1.213061, -1.0], abs=1e-5)
    assert slope == pytest.approx([-1.28, -1.213061, 1.0], abs=1e-5)
    result = clipped_weight_loss(current_N, old_N, advantage_N, 0.2, 0.28)
    assert result.loss_N.tolist() == pytest.approx([1.28, 1.6, -1.0]) and result.clipped_N.tolist() == [
        True,
        True,
        False,
    ]
    with pytest.raises(AlgorithmError, match="clip_low"):
        clipped_weight_loss(current_N, old_N, advantage_N, -0.1, 0.28)


def slow_clip(log_ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


@FEW
@given(SEEDS, st.sampled_from([None, 1.5, 3.0]))
def test_clips_agree_with_loops(seed: int, dual: float | None) -> None:
    segments, current_N, old_N, advantage_N = packed(seed)
    numbers = list(zip(current_N.tolist(), old_N.tolist(), advantage_N.tolist(), strict=True))
    by_token = clipped_policy_loss(current_N, old_N, advantage_N, 0.2, 0.28, dual).loss_N
    assert by_token.tolist() == pytest.approx([slow_clip(c - o, a, 0.2, 0.28, dual) for c, o, a in numbers], abs=1e-5)
    expected = []
    for i, (_, _, advantage) in enumerate(numbers):
        own = [j for j in range(len(numbers)) if segments.sample_N[j] == segments.sample_N[i] and segments.mask_N[j]]
        mean = sum(numbers[j][0] - numbers[j][1] for j in own) / max(len(own), 1)
        expected.append(slow_clip(mean, advantage, 0.01, 0.02, None) if segments.mask_N[i] else 0.0)
    by_sample = sequence_policy_loss(current_N, old_N, advantage_N, segments, 0.01, 0.02).loss_N
    assert by_sample.tolist() == pytest.approx(expected, abs=1e-5)
    weights = [min(math.exp(c - o), 1.28) for c, o, _ in numbers]
    slow = [-w * a * c for w, (c, _, a) in zip(weights, numbers, strict=True)]
    assert clipped_weight_loss(current_N, old_N, advantage_N, None, 0.28).loss_N.tolist() == pytest.approx(
        slow, abs=1e-5
    )


@FEW
@given(SEEDS)
def test_on_policy_every_loss_has_the_policy_gradient(seed: int) -> None:
    segments, current_N, _, advantage_N = packed(seed)
    expected = segments.masked(-advantage_N).tolist()
    for loss in (
        lambda x: segments.masked(clipped_policy_loss(x, current_N, advantage_N, 0.2, 0.28, 3.0).loss_N),
        lambda x: sequence_policy_loss(x, current_N, advantage_N, segments, 3e-4, 4e-4).loss_N,
        lambda x: segments.masked(clipped_weight_loss(x, current_N, advantage_N, None, 0.28).loss_N),
    ):
        assert gradient_of(loss, current_N)[1] == pytest.approx(expected, abs=1e-5)


@FEW
@given(SEEDS, st.integers(0, 100))
def test_a_sequence_ratio_over_ranks_equals_one_process(seed: int, cut: int) -> None:
    segments, current_N, old_N, advantage_N = packed(seed)
    whole = gradient_of(lambda x: sequence_policy_loss(x, old_N, advantage_N, segments, 0.1, 0.1).loss_N, current_N)
    parts = [slice(0, cut % len(old_N)), slice(cut % len(old_N), len(old_N))]

    def over_ranks(current: torch.Tensor) -> torch.Tensor:
        """The same with a differentiable all-reduce, which here adds what the other rank would send."""
        losses = []
        for mine, other in (parts, parts[::-1]):
            answers = [
                Segments(segments.sample_N[other], segments.mask_N[other], segments.samples).sums(x_N[other])
                for x_N in (current - old_N, torch.ones_like(old_N))
            ]
            sent = iter(answers)
            local = Segments(
                segments.sample_N[mine], segments.mask_N[mine], segments.samples, lambda partial: partial + next(sent)
            )
            loss = sequence_policy_loss(current[mine], old_N[mine], advantage_N[mine], local, 0.1, 0.1)
            losses.append(loss.loss_N)
        return torch.cat(losses)

    value, slope = gradient_of(over_ranks, current_N)
    assert value == pytest.approx(whole[0], abs=1e-5) and slope == pytest.approx(whole[1], abs=1e-5)


def test_nan_is_never_made_a_number() -> None:
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    assert clipped_policy_loss(nan, one, one, 0.2, 0.2).loss_N.isnan().all()
    assert clipped_weight_loss(nan, one, one, None, 0.2).loss_N.isnan().all()
    assert kl_estimate(nan, one, "low_variance").isnan().all()


# Divergences

DIVERGENCES: list[tuple[float, DivergenceKind, float]] = [
    (0.5, "k1", 0.5), (0.5, "k2", 0.125), (0.5, "k3", 0.106531), (0.5, "low_variance", 0.106531),
    (-0.5, "k1", -0.5), (-0.5, "k2", 0.125), (-0.5, "k3", 0.148721), (-0.5, "low_variance", 0.148721),
    (-4.0, "k1", -4), (-4.0, "k2", 8), (-4.0, "k3", 49.598150), (-4.0, "low_variance", 10),
    (3.0, "k1", 3), (3.0, "k2", 4.5), (3.0, "k3", 2.049787), (3.0, "low_variance", 2.049787),
]  # fmt: skip


@pytest.mark.parametrize(("difference", "kind", "value"), DIVERGENCES)
def test_divergence_table(difference: float, kind: DivergenceKind, value: float) -> None:
    values, slope = gradient_of(lambda x: kl_estimate(x, torch.zeros(1), kind), torch.tensor([difference]))
    assert values == pytest.approx([value], abs=1e-4)
    slopes = {"k1": 1.0, "k2": difference}
    expected = slopes.get(kind, 0.0 if value == 10 else 1 - math.exp(-difference))
    assert slope == pytest.approx([expected], abs=1e-4)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(AlgorithmError, match="k1, k2, k3, low_variance"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


@FEW
@given(SEEDS)
def test_the_unbiased_divergence_has_the_gradient_of_the_true_one(seed: int) -> None:
    """Expectation over all tokens of a small vocabulary, drawn by old: exact, without sampling noise."""
    logits, old, reference = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    old, reference = old.log_softmax(0), reference.log_softmax(0)

    def estimated(point: torch.Tensor) -> torch.Tensor:
        current = point.log_softmax(0)
        return old.exp() * kl_estimate(current, reference, "k3", current - old)

    def true(point: torch.Tensor) -> torch.Tensor:
        current = point.log_softmax(0)
        return current.exp() * (current - reference)

    (value, slope), (expected, expected_slope) = gradient_of(estimated, logits), gradient_of(true, logits)
    assert sum(value) == pytest.approx(sum(expected), abs=1e-9)
    assert slope == pytest.approx(expected_slope, abs=1e-9)


# Entropy


@FEW
@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]))
def test_log_probabilities_and_entropy_have_the_gradients_of_torch(seed: int, temperature: float) -> None:
    logits_NV = 4 * torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    which, target = torch.tensor([0, 0, 2]), torch.tensor([1, 5, 3])
    for of_chosen, of_entropy in ((1.0, 0.0), (0.0, 1.0), (-0.7, 0.3)):
        weight_N = torch.tensor([1.0, -2.0, 0.5])

        def expected(x: torch.Tensor, of_chosen: float = of_chosen, of_entropy: float = of_entropy) -> torch.Tensor:
            policy = torch.distributions.Categorical(logits=x / temperature)
            return weight_N * (of_chosen * policy.logits[which, target] + of_entropy * policy.entropy())

        def ours(x: torch.Tensor, of_chosen: float = of_chosen, of_entropy: float = of_entropy) -> torch.Tensor:
            chosen, entropy = TokenLogProbabilities.apply(x, which, target, temperature)
            return weight_N * (of_chosen * chosen + of_entropy * entropy)

        (value, slope), (wanted, wanted_slope) = gradient_of(ours, logits_NV), gradient_of(expected, logits_NV)
        assert value == pytest.approx(wanted, abs=1e-4)
        assert torch.allclose(torch.tensor(slope), torch.tensor(wanted_slope), atol=1e-4)


# Which log-probabilities enter where


def test_a_missing_score_says_what_would_produce_it() -> None:
    scores = LogProbabilities({"engine": torch.zeros(2)})
    with pytest.raises(MissingScoreError, match="reference pass"):
        scores.of("reference")
    with pytest.raises(MissingScoreError, match="with_current"):
        scores.of("current")
    assert not scores.with_current(torch.ones(2, requires_grad=True)).anchor("current").requires_grad


def test_scores_that_are_no_scores_are_refused() -> None:
    with pytest.raises(AlgorithmError, match="same"):
        LogProbabilities({"engine": torch.zeros(2), "old": torch.zeros(3)})
    with pytest.raises(AlgorithmError, match="detach"):
        LogProbabilities({"old": torch.zeros(2, requires_grad=True)})
    with pytest.raises(AlgorithmError, match="critic"):
        LogProbabilities({"critic": torch.zeros(2)})  # type: ignore[dict-item]
    masked = LogProbabilities({"old": torch.tensor([0.0, math.nan])}).masked(torch.tensor([True, False]))
    assert masked.of("old").tolist() == [0, 0]


# SFT, DPO


def test_fine_tuning_is_minus_the_log_probability() -> None:
    value, slope = gradient_of(lambda x: weighted_loss(x, torch.ones(2)).loss_N, torch.tensor([-1.0, -3.0]))
    assert value == [1, 3] and slope == [-1, -1]


def _preference_slope(segments: Segments, current_N: torch.Tensor, reference_N: torch.Tensor, rewards: list[float],
                      groups: list[int], beta: float) -> torch.Tensor:  # fmt: skip
    """The gradient that a step of the algorithm dpo takes at the current scores."""
    margin_S = beta * segments.sums(current_N - reference_N)
    graded = ExecutionRewards.of(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    advantage_N = segments.spread(beta * preference_advantages(graded, margin_S))
    settings = AlgorithmSection(name="dpo")
    weight_S = reduction_weights(segments.counts(), torch.arange(segments.samples), settings)
    point = current_N.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reduced(weighted_loss(point, advantage_N).loss_N, weight_S, segments), point)
    return slope


def test_preference_table() -> None:
    # margins: chosen (-1 - -2) + (-1 - -1) = 1, rejected -3 - -2 = -1; h = 0.5 x (1 - -1) = 1; slope 0.5 (sigmoid(1) - 1)
    segments = Segments.of_lengths([2, 2], torch.tensor([True, True, False, True]))
    reference_N, current_N = torch.tensor([-2.0, -1, 0, -2]), torch.tensor([-1.0, -1, 0, -3])
    slope = _preference_slope(segments, current_N, reference_N, [1.0, 0.0], [0, 0], 0.5)
    assert slope.tolist() == pytest.approx([-0.134471, -0.134471, 0, 0.134471], abs=1e-5)


@FEW
@given(SEEDS)
def test_preferences_have_the_gradient_of_the_loss_itself(seed: int) -> None:
    """Rafailov et al. 2023, eq. 7, differentiated by torch: mean over pairs of -log sigmoid(h)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (6,), generator=generator).tolist()
    segments = Segments.of_lengths(lengths, torch.ones(sum(lengths), dtype=torch.bool))
    current_N, reference_N = -torch.rand(2, sum(lengths), generator=generator)
    rewards = [1.0, 0.0, 0.5, 2.0, 3.0, 3.0]  # two pairs; the third group has no better one
    slope = _preference_slope(segments, current_N, reference_N, rewards, [0, 0, 1, 1, 2, 2], 0.3)
    point = current_N.clone().requires_grad_()
    margin_S = 0.3 * segments.sums(point - reference_N)
    loss = -torch.nn.functional.logsigmoid(torch.stack([margin_S[0] - margin_S[1], margin_S[3] - margin_S[2]])).mean()
    (expected,) = torch.autograd.grad(loss, point)
    assert torch.allclose(slope, expected, atol=1e-6)


# Distillation


def test_distillation_table() -> None:
    segments = Segments.of_lengths([3], torch.tensor([True, True, False]))
    reverse_kl_N = torch.tensor([-1.0, -2, -1]) - torch.tensor([-1.5, -1.0, math.nan])
    mixed = distilled_advantages(torch.tensor([2.0, 2, math.nan]), reverse_kl_N, segments, 0.5, 0.25)
    assert mixed.tolist() == pytest.approx([0.25, 1.0, 0.0])
    assert distilled_advantages(torch.ones(3), reverse_kl_N, segments, 1.0, 0.0).tolist() == [-0.5, 1.0, 0.0]
    with pytest.raises(NotFiniteError, match="teacher"):
        distilled_advantages(
            torch.ones(3), reverse_kl_N, replace(segments, mask_N=torch.ones(3, dtype=torch.bool)), 1.0
        )
