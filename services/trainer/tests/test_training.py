"""A whole step by every algorithm of the recipe, on a real backend; what bad input becomes; which numbers it reports."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_parts import MIXED, groups_of, recipe_of, sample_of
from transformers import AutoModelForCausalLM

from postroad.config import Environment
from postroad.config.algorithm import ALGORITHMS
from postroad.messages import Sample, Step, VersionSpan
from postroad_trainer.algorithms import AlgorithmError
from postroad_trainer.conversion import rows_of
from postroad_trainer.models.tiny import write_tiny_model
from postroad_trainer.service import NotFiniteGradients, TrainerService
from postroad_trainer.teacher import packed, unpacked
from postroad_trainer.training import Training

PAGE = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "llama")
    return folder


def taught(groups: list[list[Sample]], seed: int = 5) -> list[list[Sample]]:
    """With scores of a teacher that finds everything a bit likelier."""
    return [
        [
            s.model_copy(update={"teacher_log_probabilities": s.trajectory.log_probabilities * np.float32(0.9)})
            for s in members
        ]
        for members in groups
    ]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_trains_reports_and_repeats(model: Path, name: str) -> None:
    algorithm: dict[str, Any] = {"name": name, "teacher_url": "http://teacher"}
    if name == "grpo":  # with everything that may be switched on
        algorithm |= {"updates": 2, "kl_loss_coefficient": 0.1, "entropy_coefficient": 0.01, "overlong_buffer": 4}
    recipe = recipe_of({"algorithm": algorithm})
    groups = taught(groups_of(MIXED))
    trainings = [Training(recipe, model) for _ in range(2)]
    results = [training.step(groups, 3) for training in trainings]
    metrics, digest = results[0]
    assert digest == results[1][1] != Training(recipe, model).digest()
    assert metrics["grad_norm"] > 0 and metrics["trained_tokens"] == sum(
        s.trajectory.loss_mask.sum() for g in groups for s in g
    )
    assert ("seconds_reference" in metrics) == recipe.trainer.algorithm.needs_reference
    undocumented = [metric for metric in metrics if not _documented(metric)]
    assert undocumented == []


def _documented(metric: str) -> bool:
    """In the table of docs/algorithms.md, where <n> stands for a number and <name> for a name."""
    names = re.findall(r"^\| `([^|]+)` \|", PAGE, re.MULTILINE)
    patterns = [
        re.escape(n.strip("` ")).replace("<n>", r"-?\d+").replace("<name>", ".+")
        for row in names
        for n in row.split(",")
    ]
    return any(re.fullmatch(pattern, metric) for pattern in patterns)


def test_a_default_step_is_dapo_by_hand(model: Path) -> None:
    """Against transformers: the gradient's norm, from rewards to the loss."""
    groups = groups_of(MIXED)
    metrics, _ = Training(recipe_of({"grad_clip": 1e9}), model).step(groups, 3)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    count = sum(int(s.trajectory.loss_mask.sum()) for g in groups for s in g)
    gaps = []
    for members in groups:
        rewards = np.array([s.reward for s in members])
        for s, advantage in zip(members, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6), strict=True):
            tokens = torch.from_numpy(s.trajectory.tokens.astype(np.int64))
            mask = torch.from_numpy(s.trajectory.loss_mask.astype(bool))[1:]
            scores = torch.log_softmax(reference(tokens[None]).logits[0, :-1], -1)
            current = scores.gather(1, tokens[1:, None])[:, 0][mask]
            engine = torch.from_numpy(s.trajectory.log_probabilities)[1:][mask]
            weight = (current.detach() - engine).exp().clamp(max=2.0)
            (-float(advantage) * weight * current).sum().div(count).backward()
            gaps += (current.detach() - engine).abs().tolist()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["logprob_abs_diff_mean"] == pytest.approx(np.mean(gaps), abs=1e-5)
    assert metrics["logprob_abs_diff_p99"] == pytest.approx(np.quantile(gaps, 0.99), abs=1e-4)
    assert metrics["logprob_abs_diff_mean_staleness_1"] == pytest.approx(np.mean(gaps), abs=1e-5)
    assert metrics["staleness_1_fraction"] == 1 and metrics["reward_mean_of_book1"] == pytest.approx(0.375)


def test_a_critic_learns_and_is_part_of_the_checkpoint(model: Path, tmp_path: Path) -> None:
    """Its values near the return of a constant reward; a loaded pair goes on to the same digest."""
    recipe = recipe_of(
        {"algorithm": {"name": "ppo", "critic_learning_rate": 3e-3, "critic_only_steps": 8, "value_clip": 10.0}}
    )
    training = Training(recipe, model)
    groups, digest = groups_of([[0.7] * 4, [0.7] * 4]), training.digest()
    losses = [training.step(groups, version)[0]["critic_loss"] for version in range(8)]
    assert losses[0] == pytest.approx(0.49, abs=1e-5)  # the head is 0, and 0.7 comes back from every token
    assert losses[-1] < 0.1 and training.digest() == digest
    (tmp_path / "step").mkdir()
    training.save(tmp_path / "step" / "backend")
    other = Training(recipe, model)
    other.load(tmp_path / "step" / "backend")
    results = [t.step(groups_of(MIXED), 8) for t in (training, other)]
    assert results[0][1] == results[1][1] != digest
    assert results[0][0]["critic_loss"] == results[1][0]["critic_loss"]


def test_a_student_moves_to_its_teacher(model: Path) -> None:
    """Tokens that the teacher finds likelier than the student become likelier, whatever their reward."""
    training = Training(recipe_of({"algorithm": {"name": "distillation", "teacher_url": "http://teacher"}}), model)
    random = np.random.default_rng(0)
    groups = [
        [
            s.model_copy(
                update={"teacher_log_probabilities": random.normal(-4.5, 2, len(s.trajectory.tokens)).astype("f4")}
            )
            for s in members
        ]
        for members in groups_of(MIXED)
    ]
    rows = rows_of(groups)
    before = training.backend.logprobs(rows)
    for version in range(3, 9):
        training.step(groups, version)
    after = training.backend.logprobs(rows)
    wish = np.concatenate([(r.scores["teacher"] - b)[r.trained] for r, b in zip(rows, before, strict=True)])
    moved = np.concatenate([(a - b)[r.trained] for r, a, b in zip(rows, after, before, strict=True)])
    assert np.corrcoef(wish, moved)[0, 1] > 0.6


def test_samples_of_one_execution_count_once(model: Path) -> None:
    """A sub-agent's trajectory beside its parent's changes neither the mean of the group nor its weight."""
    groups = groups_of([[1.0, 1.0, 0.0, 0.0]])
    shared = [
        s.model_copy(update={"trajectory": s.trajectory.model_copy(update={"execution": "a"})}) for s in groups[0][:2]
    ]
    training = Training(recipe_of({"groups_per_step": 1}), model)
    metrics, _ = training.step([[*shared, *groups[0][2:]]], 3)
    assert metrics["advantage_max"] == pytest.approx(2 / 3 / math.sqrt(1 / 3), rel=1e-4)  # rewards 1, 0, 0


def test_what_can_not_teach_is_skipped_and_counted(model: Path) -> None:
    training = Training(recipe_of({"algorithm": {"mask_truncated": True}}), model)
    cut = [[sample_of(g, m, float(m % 2), finish_reason="length") for m in range(4)] for g in range(2)]
    digest = training.digest()
    metrics, after = training.step(cut, 3)
    assert after == digest and metrics["skipped"] == 1 and metrics["rows_masked"] == metrics["rows_skipped"] == 8
    metrics, after = training.step(groups_of([[1.0] * 4, [0.5] * 4]), 3)
    assert after == digest and metrics["groups_with_equal_rewards"] == 1 and metrics["rows_skipped"] == 8
    half = [cut[0], groups_of(MIXED)[1]]
    metrics, after = training.step(half, 3)
    assert after != digest and metrics["rows_masked"] == 4 and metrics["truncated_fraction"] == 0.5


def test_a_gradient_that_is_not_finite_is_counted(model: Path) -> None:
    training = Training(recipe_of({"algorithm": {"correction": "none"}}), model)
    training.recipe.trainer.plug_points.model_dump()
    training.plugs["rewards"] = lambda groups, rewards: [1e38 * reward for reward in rewards]
    training.algorithm = training.algorithm.model_copy(update={"advantage": "group_mean"})
    training.recipe = recipe_of({"algorithm": {"correction": "none", "advantage": "group_mean"}})
    metrics, digest = training.step(groups_of(MIXED), 3)
    assert metrics["gradients_not_finite"] == 1 and "grad_norm" not in metrics and digest == training.digest()
    training.plugs["rewards"] = lambda groups, rewards: [math.nan for _ in rewards]
    with pytest.raises(AlgorithmError, match="reward is not finite"):
        training.step(groups_of(MIXED), 3)


def test_overlong_responses_lose_reward(model: Path) -> None:
    """DAPO eq. 13 through the whole step: with equal grades, only the length is left to compare."""
    training = Training(
        recipe_of({"groups_per_step": 1, "algorithm": {"overlong_buffer": 6, "advantage": "group_mean"}}), model
    )
    groups = groups_of([[1.0, 1.0, 1.0, 1.0]])
    lengths = np.array([s.trajectory.loss_mask.sum() for s in groups[0]])
    penalties = -np.clip((lengths - 2) / 6, 0, 1)
    metrics, _ = training.step(groups, 3)
    assert metrics["advantage_max"] == pytest.approx((penalties - penalties.mean()).max(), abs=1e-6)


def test_staleness_is_by_token(model: Path) -> None:
    spans = [VersionSpan(start=0, end=7, version=1), VersionSpan(start=7, end=99, version=3)]
    groups = groups_of(MIXED)
    groups[0][0] = sample_of(0, 0, 1.0, versions=spans)
    metrics, _ = Training(recipe_of(), model).step(groups, 3)
    total = metrics["trained_tokens"]
    assert metrics["staleness_2_fraction"] == pytest.approx(1 / total) and metrics["staleness_max"] == 2
    assert metrics["mixed_versions_fraction"] == 1 / 8


def test_the_teachers_scores_survive_the_log() -> None:
    groups = taught(groups_of(MIXED))
    samples = [s for g in groups for s in g]
    bare = [s.model_copy(update={"teacher_log_probabilities": None}) for s in samples]
    for before, after in zip(samples, unpacked(bare, packed(groups)), strict=True):
        np.testing.assert_array_equal(before.teacher_log_probabilities, after.teacher_log_probabilities)
    assert packed([bare]) is None and unpacked(bare, None) == bare


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    environment = Environment("run", tmp_path, tmp_path / "recipe.yaml", "nats://", "redis://", "key", tmp_path)
    service = TrainerService(environment, recipe_of())

    def log(number: int, broken: bool) -> None:
        metrics = {"gradients_not_finite": float(broken)}
        logged = {"run": "run", "id": str(number), "number": number, "version": number, "digest": ""}
        service._count_broken(Step(**logged, sequences=[], samples=[], groups=[], metrics=metrics))

    for number, broken in enumerate([True, True, False, True, True], 1):
        log(number, broken)
    with pytest.raises(NotFiniteGradients, match=r"steps 4 to 6 .* --steps 4:6"):
        log(6, True)
