"""Advantages, returns and whitening: tables of reference/algorithms.md §14, plain loops as a second opinion, properties."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postroad_trainer.algorithms.critic import generalised_advantages, token_rewards, value_loss
from postroad_trainer.algorithms.dapo import overlong_penalty
from postroad_trainer.algorithms.errors import (
    AlgorithmError,
    ExecutionRewardsError,
    NotFiniteError,
    NothingTrainedError,
)
from postroad_trainer.algorithms.groups import ExecutionRewards, group_advantages, leave_one_out_advantages
from postroad_trainer.algorithms.returns import (
    discounted_sums,
    reinforce_baseline_advantages,
    reinforce_plus_plus_returns,
)
from postroad_trainer.algorithms.segments import Segments, places
from postroad_trainer.algorithms.whitening import whiten

FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 1 << 30)


def rewards_of(
    rewards: list[float], groups: list[int] | None = None, executions: list[int] | None = None
) -> ExecutionRewards:
    group_S = torch.tensor(groups if groups is not None else [0] * len(rewards))
    execution_S = None if executions is None else torch.tensor(executions)
    return ExecutionRewards.of(torch.tensor(rewards, dtype=torch.float64), group_S, execution_S)


def ragged(seed: int) -> tuple[Segments, torch.Generator]:
    """One to five samples of one to nine tokens, each with a trained one, packed in a random interleaving."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 6, (1,), generator=generator))
    lengths_S = torch.randint(1, 10, (samples,), generator=generator)
    sample_N = torch.repeat_interleave(torch.arange(samples), lengths_S)
    sample_N = sample_N[torch.randperm(len(sample_N), generator=generator)]
    mask_N = torch.rand(len(sample_N), generator=generator) < 0.6
    for sample in range(samples):
        mask_N[(sample_N == sample).nonzero()[0]] = True
    return Segments(sample_N, mask_N, samples), generator


def positions(segments: Segments, sample: int) -> list[int]:
    return (segments.sample_N == sample).nonzero().flatten().tolist()


# Groups


def test_compaction_siblings_count_once() -> None:
    advantages = group_advantages(rewards_of([1, 1, 0, 0], executions=[7, 7, 2, 5]))
    assert advantages.tolist() == pytest.approx([1.154699, 1.154699, -0.577349, -0.577349], abs=1e-5)


def test_leave_one_out_table() -> None:
    # (1 - 0, 0 - 1/2, 0 - 1/2) twice for the siblings of the first; the second group is one execution alone
    advantages = leave_one_out_advantages(rewards_of([1, 1, 0, 0, 3], [0, 0, 0, 0, 9], [7, 7, 2, 5, 7]))
    assert advantages.tolist() == pytest.approx([1, 1, -0.5, -0.5, 0])


def test_siblings_that_disagree_are_an_error() -> None:
    with pytest.raises(ExecutionRewardsError, match="grade an execution once"):
        rewards_of([1, 0, 0], executions=[7, 7, 2])
    with pytest.raises(NotFiniteError):
        rewards_of([math.nan, 0])
    with pytest.raises(AlgorithmError, match="no rewards"):
        rewards_of([])


def slow_groups(rewards: list[float], groups: list[int], executions: list[int], kind: str) -> list[float]:
    result = []
    for reward, group, execution in zip(rewards, groups, executions, strict=True):
        draws = {e: r for r, g, e in zip(rewards, groups, executions, strict=True) if g == group}
        values = list(draws.values())
        others = [r for e, r in draws.items() if e != execution]
        if kind == "leave_one_out":
            result.append(reward - statistics.mean(others) if others else 0.0)
        else:
            centred = reward - statistics.mean(values)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            result.append(centred / (deviation + 1e-6) if kind == "std" and deviation else centred)
    return result


KINDS: dict[str, Callable[[ExecutionRewards], torch.Tensor]] = {
    "std": group_advantages,
    "mean": lambda rewards: group_advantages(rewards, normalise_std=False),
    "leave_one_out": leave_one_out_advantages,
}
DRAWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12)


@FEW
@given(DRAWS, st.sampled_from(sorted(KINDS)), st.integers(-40, 40), SEEDS)
def test_groups_agree_with_loops_and_ignore_a_shift(
    draws: list[tuple[int, int]], kind: str, shift: int, seed: int
) -> None:
    table = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    groups, executions = [g for g, _ in draws], [e for _, e in draws]
    rewards = [float(table[g, e]) for g, e in draws]
    advantages = KINDS[kind](rewards_of(rewards, groups, executions))
    assert advantages.tolist() == pytest.approx(slow_groups(rewards, groups, executions, kind), abs=1e-5)
    shifted = KINDS[kind](rewards_of([reward + shift for reward in rewards], groups, executions))
    assert torch.allclose(shifted, advantages, atol=1e-4)
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed)).tolist()
    permuted = KINDS[kind](
        rewards_of([rewards[i] for i in order], [groups[i] for i in order], [executions[i] for i in order])
    )
    assert torch.allclose(permuted, advantages[order], atol=1e-6)


# Returns


def test_reinforce_plus_plus_table() -> None:
    mask_N, kl_N = torch.tensor([True, False, True, False]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    segments = Segments.of_lengths([4], mask_N)
    returns = reinforce_plus_plus_returns(torch.tensor([1.0]), kl_N, segments, 0.1, 0.9)
    assert returns.tolist() == pytest.approx([0.72854, 0.82060, 0.93400, -0.04], abs=1e-5)
    baseline = reinforce_baseline_advantages(torch.tensor([0.5]), kl_N, Segments.of_lengths([4], mask_N | True), 0.1)
    assert baseline.tolist() == pytest.approx([0.49, 0.48, 0.47, 0.46])


def test_a_reward_without_a_token_is_dropped_and_what_is_not_finite_refused() -> None:
    segments = Segments.of_lengths([1, 2], torch.tensor([True, False, False]))
    assert reinforce_plus_plus_returns(torch.ones(2), torch.zeros(3), segments, 0.0, 1.0).tolist() == [1, 0, 0]
    with pytest.raises(NotFiniteError, match="KL"):
        reinforce_plus_plus_returns(
            torch.ones(1), torch.tensor([math.inf]), Segments.of_lengths([1], torch.tensor([True])), 0.1, 1.0
        )
    with pytest.raises(NotFiniteError, match="reward"):
        reinforce_baseline_advantages(torch.tensor([math.nan, 0]), torch.zeros(3), segments, 0.1)


@pytest.mark.parametrize("decay", [0.0, 0.97, 1.0])
@pytest.mark.parametrize("length", [0, 1, 128, 129, 300])
def test_chunked_sums_agree_with_a_loop(decay: float, length: int) -> None:
    x_SL = torch.randn(2, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    expected, carry = torch.zeros_like(x_SL), torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(length)):
        carry = x_SL[:, t] + decay * carry
        expected[:, t] = carry
    assert torch.allclose(discounted_sums(x_SL, decay), expected, atol=1e-12)


def test_a_discount_above_one_is_refused() -> None:
    with pytest.raises(AlgorithmError, match="decay"):
        discounted_sums(torch.zeros(1, 1), 1.01)


@FEW
@given(SEEDS, st.floats(0, 1))
def test_reinforce_plus_plus_agrees_with_loops(seed: int, discount: float) -> None:
    segments, generator = ragged(seed)
    kl_N = torch.randn(len(segments.mask_N), generator=generator)
    reward_S = torch.randn(segments.samples, generator=generator)
    expected = torch.zeros(len(kl_N))
    for sample in range(segments.samples):
        own = positions(segments, sample)
        last = max(i for i in own if segments.mask_N[i])
        carry = 0.0
        for i in reversed(own):
            carry = -0.3 * float(kl_N[i]) + (float(reward_S[sample]) if i == last else 0.0) + discount * carry
            expected[i] = carry
    returns = reinforce_plus_plus_returns(reward_S, kl_N, segments, 0.3, discount)
    assert torch.allclose(returns, expected, atol=1e-5)


# Critic


def test_gae_table() -> None:
    mask_N = torch.tensor([True, True, False, True])
    segments = Segments.of_lengths([4], mask_N)
    reward_N = token_rewards(torch.tensor([1.0]), torch.zeros(4), segments, 0.0)
    result = generalised_advantages(reward_N, torch.tensor([0.5, 0.4, 9.0, 0.3]), segments, 0.9, 0.8)
    assert result.advantage_N.tolist() == pytest.approx([0.12928, 0.374, 0, 0.7], abs=1e-5)
    assert result.return_N.tolist() == pytest.approx([0.62928, 0.774, 0, 1.0], abs=1e-5)


@FEW
@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_gae_agrees_with_loops_and_masked_tokens_never_leak(seed: int, discount: float, gae_lambda: float) -> None:
    segments, generator = ragged(seed)
    value_N, kl_N = torch.randn(2, len(segments.mask_N), generator=generator)
    reward_S = torch.randn(segments.samples, generator=generator)
    expected = torch.zeros(len(value_N))
    for sample in range(segments.samples):
        own = [i for i in positions(segments, sample) if segments.mask_N[i]]
        carry, following = 0.0, 0.0
        for i in reversed(own):
            reward = -0.2 * float(kl_N[i]) + (float(reward_S[sample]) if i == own[-1] else 0.0)
            carry = reward + discount * following - float(value_N[i]) + discount * gae_lambda * carry
            expected[i], following = carry, float(value_N[i])
    broken = [torch.where(segments.mask_N, x_N, math.nan) for x_N in (kl_N, value_N)]
    reward_N = token_rewards(reward_S, broken[0], segments, 0.2)
    result = generalised_advantages(reward_N, broken[1], segments, discount, gae_lambda)
    assert torch.allclose(result.advantage_N, expected, atol=1e-5)
    assert torch.allclose(result.return_N, segments.masked(expected + value_N), atol=1e-5)


def test_gae_of_an_untrained_sample_is_zero_and_nan_is_an_error() -> None:
    segments = Segments.of_lengths([2], torch.tensor([False, False]))
    reward_N = token_rewards(torch.tensor([1.0]), torch.zeros(2), segments, 0.1)
    result = generalised_advantages(reward_N, torch.ones(2), segments, 1.0, 1.0)
    assert result.advantage_N.tolist() == result.return_N.tolist() == [0, 0]
    trained = Segments.of_lengths([2], torch.tensor([True, False]))
    with pytest.raises(NotFiniteError, match="critic"):
        generalised_advantages(torch.zeros(2), torch.tensor([math.nan, 0]), trained, 1.0, 1.0)


@pytest.mark.parametrize(
    ("value", "loss", "slope", "clipped"),
    [(1.0, 4.0, -4.0, False), (1.1, 3.61, -3.8, False), (1.5, 3.24, 0.0, True), (0.5, 6.25, -5.0, False)],
)
def test_value_loss_table(value: float, loss: float, slope: float, clipped: bool) -> None:
    # old value 1, return 3, clip 0.2: from 1.2 on the clipped branch (1.2 - 3)^2 is the larger one
    values_N = torch.tensor([value, math.nan], requires_grad=True)
    mask_N = torch.tensor([True, False])
    result = value_loss(values_N, torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]), mask_N, 0.2)
    (gradient,) = torch.autograd.grad(result.loss_N.sum(), values_N)
    assert float(result.loss_N[0].detach()) == pytest.approx(loss) and bool(result.clipped_N[0]) is clipped
    assert gradient.tolist() == pytest.approx([slope, 0.0]) and float(result.loss_N[1].detach()) == 0
    with pytest.raises(AlgorithmError, match="value clip"):
        value_loss(values_N, values_N, values_N, mask_N, 0.0)


# Whitening


def test_whitening_table() -> None:
    x_N, mask_N = torch.tensor([1.0, 2, 3, 4]), torch.tensor([True, True, False, True])
    expected = [-0.872872, -0.218218, 0.436436, 1.091089]
    assert whiten(x_N, mask_N).tolist() == pytest.approx(expected, abs=1e-5)
    assert whiten(torch.tensor([5.0, math.nan]), torch.tensor([True, False])).tolist() == [0, 0]


def test_whitening_keeps_precision_far_from_zero() -> None:
    x_N = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    assert whiten(x_N, torch.ones(3, dtype=torch.bool)).tolist() == pytest.approx([-1, 0, 1])


def on_ranks(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor | Exception]:
    """whiten on one thread per rank, with a reduce that every rank must call equally often."""
    barrier, slots = Barrier(len(parts), timeout=20), [torch.zeros(())] * len(parts)

    def rank(index: int) -> torch.Tensor | Exception:
        def reduce(partial: torch.Tensor) -> torch.Tensor:
            slots[index] = partial
            barrier.wait()
            total = torch.stack(list(slots)).sum(0)
            barrier.wait()
            return total

        try:
            return whiten(*parts[index], reduce)
        except AlgorithmError as error:
            return error

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_whitening_over_ranks_equals_one_process(seed: int) -> None:
    segments, generator = ragged(seed)
    x_N = torch.randn(len(segments.mask_N), generator=generator, dtype=torch.float64) * 3 + 5
    halves = list(zip(x_N.tensor_split(2), segments.mask_N.tensor_split(2), strict=True))
    idle = (torch.full((2,), math.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.bool))
    parts = [part for part in on_ranks([*halves, idle])[:2] if isinstance(part, torch.Tensor)]
    whole_N = whiten(x_N, segments.mask_N)
    assert torch.allclose(torch.cat(parts), whole_N, atol=1e-5)
    trained = whole_N[segments.mask_N]
    assert float(trained.mean()) == pytest.approx(0, abs=1e-5)
    if len(trained) > 1:
        variance = float(x_N[segments.mask_N].var())
        assert float(trained.var()) == pytest.approx(variance / (variance + 1e-8), abs=1e-5)
    assert torch.allclose(whiten(x_N + 7, segments.mask_N), whole_N, atol=1e-4)


def test_what_one_rank_finds_wrong_stops_all() -> None:
    good = (torch.ones(2), torch.ones(2, dtype=torch.bool))
    bad = (torch.tensor([math.nan, 1]), torch.ones(2, dtype=torch.bool))
    nothing = (torch.ones(2), torch.zeros(2, dtype=torch.bool))
    assert [type(result) for result in on_ranks([good, bad])] == [NotFiniteError] * 2
    assert [type(result) for result in on_ranks([nothing, nothing])] == [NothingTrainedError] * 2


# Parts


def test_overlong_table() -> None:
    lengths = torch.tensor([0, 80, 81, 90, 100, 200])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert float(overlong_penalty(lengths, 100, 20, 0.5)[3]) == pytest.approx(-0.25)
    with pytest.raises(AlgorithmError, match="buffer"):
        overlong_penalty(lengths, 100, 0)


@FEW
@given(SEEDS)
def test_segments_agree_with_loops(seed: int) -> None:
    segments, generator = ragged(seed)
    x_N = torch.randn(len(segments.mask_N), generator=generator)
    counted: dict[int, int] = {}
    for i, sample in enumerate(segments.sample_N.tolist()):
        assert int(places(segments.sample_N, segments.samples)[i]) == counted.get(sample, 0)
        counted[sample] = counted.get(sample, 0) + 1
    for sample in range(segments.samples):
        own = [i for i in positions(segments, sample) if segments.mask_N[i]]
        assert float(segments.sums(x_N)[sample]) == pytest.approx(sum(float(x_N[i]) for i in own), abs=1e-5)
        assert segments.last()[own].tolist() == [False] * (len(own) - 1) + [True]
    assert int(segments.last().sum()) == segments.samples
    with pytest.raises(AlgorithmError, match="bool"):
        Segments(segments.sample_N, segments.mask_N.float(), segments.samples)
