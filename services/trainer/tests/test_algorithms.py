"""The mathematics of a step against values computed by hand (reference/algorithms.md §14) and its properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postroad.config.algorithm import AlgorithmSection
from postroad_trainer.algorithms.corrections import truncated_importance_weights
from postroad_trainer.algorithms.divergences import kl_k3
from postroad_trainer.algorithms.groups import ExecutionRewards, group_advantages
from postroad_trainer.algorithms.losses import clipped_policy_loss
from postroad_trainer.algorithms.reducers import reduction_weights

REWARDS = st.lists(st.floats(-100, 100), min_size=1, max_size=9)
LOGPROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=9)


def grpo_advantages(rewards_GN: torch.Tensor, normalise_std: bool = True) -> torch.Tensor:
    """[G, N] of a table of groups of one size."""
    groups, attempts = rewards_GN.shape
    group_S = torch.arange(groups).repeat_interleave(attempts)
    return group_advantages(ExecutionRewards.of(rewards_GN.flatten(), group_S), normalise_std).view(groups, attempts)


def token_weights(counts: list[int], reducer: str, length: int | None = None) -> list[float]:
    settings = AlgorithmSection(reducer=reducer, constant_length=length)
    return reduction_weights(torch.tensor(counts), torch.arange(len(counts)), settings).tolist()


def test_advantages_of_a_group_of_eight() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0]])
    centred, normalised = grpo_advantages(rewards, normalise_std=False), grpo_advantages(rewards)
    assert centred[0, :2].tolist() == pytest.approx([0.625, -0.375])
    assert normalised[0, :2].tolist() == pytest.approx([1.207612, -0.724567], abs=1e-6)


@pytest.mark.parametrize("rewards", [[0.1] * 7, [3.0], [0.0, 0.0]])
def test_equal_rewards_have_advantage_exactly_zero(rewards: list[float]) -> None:
    assert grpo_advantages(torch.tensor([rewards])).tolist() == [[0.0] * len(rewards)]


@given(REWARDS, st.floats(-50, 50))
def test_advantages_sum_to_zero_and_ignore_a_shift(rewards: list[float], shift: float) -> None:
    given_rewards = torch.tensor([rewards], dtype=torch.float64)
    advantages = grpo_advantages(given_rewards, normalise_std=False)
    assert float(advantages.sum()) == pytest.approx(0, abs=1e-3)
    assert torch.allclose(grpo_advantages(given_rewards + shift, normalise_std=False), advantages, atol=1e-4)


def test_rewards_that_are_no_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="reward"):
        grpo_advantages(torch.tensor([[math.nan, 1.0]]))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "clipped"),
    [
        (0.0, 1.0, -1.0, False),
        (0.4, 1.0, -1.28, True),
        (0.4, -1.0, 1.491825, False),
        (-0.4, 1.0, -0.670320, False),
        (-0.4, -1.0, 0.8, True),
        (2.0, 1.0, -1.28, True),
        (2.0, -1.0, 7.389056, False),
    ],
)
def test_policy_loss_table(log_ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    result = clipped_policy_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), 0.2, 0.28)
    assert float(result.loss_N) == pytest.approx(loss, abs=1e-5)
    assert bool(result.clipped_N) is clipped


@given(LOGPROBS, st.floats(-3, 3))
def test_an_on_policy_loss_has_the_policy_gradient(logprobs: list[float], advantage: float) -> None:
    current = torch.tensor(logprobs, requires_grad=True)
    loss = clipped_policy_loss(current, current.detach(), torch.full_like(current, advantage), 0.2, 0.28)
    (gradient,) = torch.autograd.grad(loss.loss_N.sum(), current)
    assert torch.allclose(gradient, torch.full_like(gradient, -advantage), atol=1e-6)
    assert not loss.clipped_N.any()


def test_truncated_weights_table() -> None:
    old, engine = torch.tensor([-1.0, -2, -0.5, -4]), torch.tensor([-1.2, -1, -2, -3.9])
    weights = truncated_importance_weights(old, engine, cap=2.0)
    assert weights.tolist() == pytest.approx([1.221403, 0.367879, 2.0, 0.904837], abs=1e-5)


@given(LOGPROBS, LOGPROBS, st.floats(0.1, 10))
def test_truncated_weights_are_bounded_and_detached(old: list[float], engine: list[float], cap: float) -> None:
    size = min(len(old), len(engine))
    weights = truncated_importance_weights(
        torch.tensor(old[:size], requires_grad=True), torch.tensor(engine[:size]), cap
    )
    assert not weights.requires_grad
    assert float(weights.max()) <= cap * (1 + 1e-6) and float(weights.min()) > 0


@pytest.mark.parametrize(
    ("difference", "value"), [(0.5, 0.106531), (-0.5, 0.148721), (-4.0, 49.598150), (3.0, 2.049787)]
)
def test_k3_table(difference: float, value: float) -> None:
    assert float(kl_k3(torch.tensor([difference]), torch.zeros(1))) == pytest.approx(value, abs=1e-4)


@given(LOGPROBS)
def test_k3_is_never_negative_and_zero_for_equals(logprobs: list[float]) -> None:
    sampler = torch.tensor(logprobs)
    assert (kl_k3(sampler, sampler / 2) >= 0).all()
    assert (kl_k3(sampler, sampler) == 0).all()


def test_reducers_table() -> None:
    assert token_weights([2, 6], "token") == [1 / 8, 1 / 8]
    assert token_weights([2, 6], "sample") == [1 / 4, 1 / 12]
    assert token_weights([2, 6], "constant", 10) == [1 / 20, 1 / 20]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.sampled_from(["token", "sample"]))
def test_the_weights_of_all_tokens_add_to_one(counts: list[int], reducer: str) -> None:
    weights = token_weights(counts, reducer)
    assert sum(weight * count for weight, count in zip(weights, counts, strict=True)) == pytest.approx(1)


def test_a_constant_reducer_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="constant_length"):
        token_weights([1], "constant")
