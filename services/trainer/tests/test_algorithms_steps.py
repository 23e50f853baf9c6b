"""Every registered algorithm as a whole step: masks never leak, and no cut, order or placement changes the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from postroad.config import algorithm as section
from postroad.config.algorithm import ALGORITHMS, AlgorithmSection
from postroad_trainer.algorithms import (
    AlgorithmError,
    LogProbabilities,
    Rewarded,
    Segments,
    advantages_of_step,
    policy_objective,
    weights_of_step,
)
from postroad_trainer.algorithms.errors import MissingScoreError, NothingTrainedError
from postroad_trainer.algorithms.log_probabilities import Role
from postroad_trainer.algorithms.parts import ADVANTAGES, CORRECTIONS, LOSSES, REDUCERS
from postroad_trainer.algorithms.reducers import reduced, reduction_weights

FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 1 << 30)
ROLES: tuple[Role, ...] = ("current", "engine", "old", "proximal", "reference", "teacher", "value")
TEACHER = {"teacher_url": "http://teacher"}


def algorithm(name: str, **changes: Any) -> AlgorithmSection:
    return AlgorithmSection(**{"name": name, "anchor": "old", "constant_length": 11, **TEACHER, **changes})


def complete(name: str, **changes: Any) -> AlgorithmSection:
    """With everything that may be switched on, so that one test covers it."""
    on = {
        "entropy_coefficient": 0.01,
        "kl_loss_coefficient": 0.1,
        "unbiased_kl": True,
        "off_policy_delta": 0.05,
        "distillation_coefficient": 0.2,
        "reward_weight": 0.7,
        "importance": {
            "level": "sequence",
            "mode": "clip",
            "rejection": {"level": "geometric", "low": 0.7, "high": 1.4},
            "veto": 0.1,
        },
    }
    return algorithm(name, **{**on, **changes})


ALL = {name: complete(name) for name in ALGORITHMS}
ALL |= {f"grpo with {name}": complete("grpo", correction=name) for name in CORRECTIONS}
ALL["decoupled"] = complete("decoupled_ppo", anchor="proximal")
ALL["bypass"] = complete("grpo", anchor="engine", correction="none")
ALL["one step"] = complete("grpo", anchor="current", distillation_coefficient=0.0, off_policy_delta=None)


@dataclass
class Step:
    """Six samples of four executions in two groups, seven tokens at most each."""

    reward_S: torch.Tensor
    group_S: torch.Tensor
    execution_S: torch.Tensor
    segments: Segments
    scores: dict[Role, torch.Tensor]
    entropy_N: torch.Tensor

    @staticmethod
    def of(seed: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 8, (6,), generator=generator).tolist()
        mask_N = torch.rand(sum(lengths), generator=generator) < 0.7
        mask_N[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
        old_N = -2 * torch.rand(sum(lengths), generator=generator)
        noise = torch.randn(len(ROLES), sum(lengths), generator=generator) / 5
        reward_E = torch.rand(4, generator=generator)
        execution_S = torch.tensor([0, 0, 1, 2, 3, 3])
        return Step(
            reward_E[execution_S],
            torch.tensor([0, 0, 0, 1, 1, 1]),
            execution_S,
            Segments.of_lengths(lengths, mask_N),
            {role: old_N + noise[i] for i, role in enumerate(ROLES)},
            torch.rand(sum(lengths), generator=generator),
        )

    def advantages(self, chosen: AlgorithmSection) -> torch.Tensor:
        stored = LogProbabilities({role: score_N for role, score_N in self.scores.items() if role != "current"})
        rewarded = Rewarded(self.reward_S, self.group_S, self.execution_S, self.segments, stored)
        return advantages_of_step(chosen, rewarded)

    def loss(self, chosen: AlgorithmSection, cuts: list[list[int]]) -> tuple[float, torch.Tensor]:
        """The step's loss and the gradient of the current scores, samples computed in these micro-batches."""
        advantage_N = self.advantages(chosen)
        weight_S = weights_of_step(chosen, self.segments.counts().long(), self.execution_S)
        current_N = self.scores["current"].clone().requires_grad_()
        total = torch.zeros(())
        for samples in cuts:
            pick = torch.cat([(self.segments.sample_N == sample).nonzero().flatten() for sample in samples])
            lengths = [int((self.segments.sample_N == sample).sum()) for sample in samples]
            part = Segments.of_lengths(lengths, self.segments.mask_N[pick])
            scores = LogProbabilities({r: s[pick] for r, s in self.scores.items() if r != "current"})
            scores = scores.with_current(current_N[pick])
            weights = weight_S[torch.tensor(samples)]
            total = (
                total + policy_objective(chosen, scores, advantage_N[pick], part, weights, self.entropy_N[pick]).loss
            )
        (gradient_N,) = torch.autograd.grad(total, current_N)
        return float(total.detach()), gradient_N


@pytest.mark.parametrize("name", sorted(ALL))
@FEW
@given(seed=SEEDS)
def test_neither_cut_nor_order_changes_the_gradient(name: str, seed: int) -> None:
    step = Step.of(seed)
    loss, gradient_N = step.loss(ALL[name], [[0, 1, 2, 3, 4, 5]])
    for cuts in ([[5, 2, 0, 1, 4, 3]], [[0, 5], [1, 2, 3], [4]], [[i] for i in range(6)]):
        other, other_N = step.loss(ALL[name], cuts)
        assert other == pytest.approx(loss, abs=1e-5)
        assert torch.allclose(other_N, gradient_N, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ALL))
@FEW
@given(seed=SEEDS)
def test_masked_tokens_never_leak(name: str, seed: int) -> None:
    step = Step.of(seed)
    loss, gradient_N = step.loss(ALL[name], [[0, 1, 2, 3, 4, 5]])
    mask_N = step.segments.mask_N
    assert math.isfinite(loss) and gradient_N[~mask_N].abs().sum() == 0 and gradient_N[mask_N].abs().sum() > 0
    step.scores = {role: torch.where(mask_N, score_N, math.nan) for role, score_N in step.scores.items()}
    step.entropy_N = torch.where(mask_N, step.entropy_N, math.inf)
    broken, broken_N = step.loss(ALL[name], [[0, 1, 2, 3, 4, 5]])
    assert broken == loss and torch.equal(broken_N, gradient_N)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@FEW
@given(seed=SEEDS)
def test_on_policy_the_gradient_is_the_plain_policy_gradient(name: str, seed: int) -> None:
    """With current = old = engine every algorithm's gradient is -(reducer weight) x advantage."""
    step = Step.of(seed)
    step.scores = {role: step.scores["current"] for role in ROLES}
    chosen = algorithm(name)
    _, gradient_N = step.loss(chosen, [[0, 1, 2], [3, 4, 5]])
    weight_S = weights_of_step(chosen, step.segments.counts().long(), step.execution_S)
    expected_N = -step.advantages(chosen) * step.segments.spread(weight_S).float()
    assert torch.allclose(gradient_N, step.segments.masked(expected_N), atol=1e-6)


@FEW
@given(SEEDS)
def test_a_whole_step_agrees_with_loops(seed: int) -> None:
    """GRPO with TIS, entropy and KL to the reference, written once more with numbers instead of tensors."""
    step = Step.of(seed)
    chosen = algorithm("grpo", clip_high=0.28, kl_loss_coefficient=0.1, kl_kind="k3", entropy_coefficient=0.02)
    loss, _ = step.loss(chosen, [[0, 1, 2, 3, 4, 5]])
    sample, mask = step.segments.sample_N.tolist(), step.segments.mask_N.tolist()
    execution, rewards = step.execution_S.tolist(), step.reward_S.tolist()
    pairs = {0: (rewards[0], rewards[2]), 1: (rewards[3], rewards[4])}  # two executions in each group
    expected = 0.0
    for i, s in enumerate(sample):
        if not mask[i]:
            continue
        one, two = pairs[step.group_S.tolist()[s]]
        mean = (one + two) / 2
        advantage = (rewards[s] - mean) / (math.sqrt((one - mean) ** 2 + (two - mean) ** 2) + 1e-6)
        trained = sum(1 for j, t in enumerate(sample) if mask[j] and execution[t] == execution[s])
        score = {role: float(score_N[i]) for role, score_N in step.scores.items()}
        ratio = math.exp(score["current"] - score["old"])
        policy = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
        difference = score["reference"] - score["current"]
        divergence = math.exp(difference) - 1 - difference
        token = min(math.exp(score["old"] - score["engine"]), 2.0) * policy
        expected += (token - 0.02 * float(step.entropy_N[i]) + 0.1 * divergence) / (4 * trained)
    assert loss == pytest.approx(expected, abs=1e-5)


# Reducers and masks


def test_reduction_table() -> None:
    x_N = torch.tensor([1.0, 2, 3, 1, 1, 1, 3, 5])
    mask_N = torch.tensor([True, True, False, True, True, True, True, True])
    segments = Segments.of_lengths([3, 4, 1], mask_N)
    counts, executions = segments.counts().long(), torch.tensor([4, 4, 9])
    for reducer, length, value in (("sample", None, 3.25), ("token", None, 2.0), ("constant", 7, 1.0)):
        weight_S = reduction_weights(counts, executions, algorithm("grpo", reducer=reducer, constant_length=length))
        assert float(reduced(x_N, weight_S, segments)) == pytest.approx(value)
        split = [slice(0, 2), slice(2, 8)]  # in the middle of a sample, as context parallelism does
        parts = [Segments(segments.sample_N[part], mask_N[part], 3) for part in split]
        sums = [float(reduced(x_N[part], weight_S, own)) for part, own in zip(split, parts, strict=True)]
        assert sum(sums) == pytest.approx(value)


def test_reducers_refuse_what_they_are_not_defined_for() -> None:
    token, constant = algorithm("dapo"), algorithm("dr_grpo", constant_length=None)
    with pytest.raises(NothingTrainedError, match="skip the step"):
        reduction_weights(torch.zeros(2), torch.arange(2), token)
    with pytest.raises(AlgorithmError, match="constant_length"):
        reduction_weights(torch.ones(2), torch.arange(2), constant)
    with pytest.raises(AlgorithmError, match="executions"):
        reduction_weights(torch.ones(2), torch.arange(3), token)
    # a sample without trained tokens weighs nothing, but its execution counts
    assert reduction_weights(torch.tensor([2, 0]), torch.arange(2), algorithm("grpo")).tolist() == [1 / 4, 1 / 2]


def test_a_part_without_tokens_has_loss_zero_and_touches_the_graph() -> None:
    current_N = torch.zeros(0, requires_grad=True)
    scores = LogProbabilities({"current": current_N, "old": torch.zeros(0), "engine": torch.zeros(0)})
    empty = Segments.of_lengths([0], torch.zeros(0, dtype=torch.bool))
    result = policy_objective(algorithm("grpo"), scores, torch.zeros(0), empty, torch.ones(1))
    assert float(result.loss.detach()) == 0 and result.loss.requires_grad and float(result.sums["trained"]) == 0


# Settings


def test_the_names_of_the_recipe_are_those_of_the_tables() -> None:
    for kind, table in (
        (section.Advantage, ADVANTAGES),
        (section.Loss, LOSSES),
        (section.Correction, CORRECTIONS),
        (section.Reducer, REDUCERS),
    ):
        assert set(get_args(kind)) == set(table)
    assert set(get_args(AlgorithmSection.model_fields["name"].annotation)) == set(ALGORITHMS)
    assert set(get_args(section.Anchor)) < set(ROLES)


def test_a_name_brings_its_values_and_a_key_changes_one() -> None:
    assert AlgorithmSection.model_validate("gspo").clip_low == 3e-4
    changed = AlgorithmSection(name="gspo", clip_low=0.1)
    assert (changed.clip_low, changed.clip_high, changed.loss) == (0.1, 4e-4, "sequence_clip")
    assert AlgorithmSection.model_validate(changed.model_dump()) == changed
    assert [AlgorithmSection(name=name, **TEACHER).anchor for name in ("dapo", "decoupled_ppo", "distillation")] == [
        "current",
        "proximal",
        "old",
    ]
    assert AlgorithmSection(updates=2).anchor == "old" and AlgorithmSection(anchor="engine").correction == "none"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "gpro"}, "grpo"),
        ({"advantage": "grup"}, "did you mean 'group'"),
        ({"correction": "tis", "anchor": "engine"}, "nothing to correct"),
        ({"kl_reward_coefficient": 0.1}, "kl_loss_coefficient"),
        ({"advantage": "reinforce_plus_plus", "anchor": "current", "kl_reward_coefficient": 0.1}, "before the step"),
        ({"anchor": "current", "updates": 2}, "ratio is 1"),
        ({"loss": "sequence_clip", "dual_clip": 3.0}, "dual_clip"),
        ({"advantage": "reinforce_plus_plus", "kl_reward_coefficient": 0.1, "kl_loss_coefficient": 0.1}, "twice"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient"),
        ({"distillation_coefficient": 1.0}, "teacher_url"),
        ({"weight_low": 3.0}, "weight_high"),
    ],
)
def test_settings_without_effect_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        AlgorithmSection(**wrong)


def test_what_is_missing_is_named() -> None:
    step = Step.of(0)
    del step.scores["reference"]
    with pytest.raises(MissingScoreError, match="reference"):
        step.advantages(algorithm("reinforce_plus_plus", kl_reward_coefficient=0.1))
    scores = LogProbabilities(step.scores)
    with pytest.raises(MissingScoreError, match="entropy"):
        chosen = algorithm("grpo", entropy_coefficient=0.1)
        policy_objective(chosen, scores, step.entropy_N, step.segments, torch.ones(6))


def test_a_group_without_a_difference_teaches_nothing() -> None:
    step = Step.of(3)
    step.reward_S = torch.full((6,), 0.1)
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"):
        loss, gradient_N = step.loss(algorithm(name), [[0, 1, 2, 3, 4, 5]])
        assert loss == 0 and not gradient_N.any()
