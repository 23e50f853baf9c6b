"""The step itself: shared prompts, gradients against transformers, what is skipped, what is refused."""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backend_parts import FROZEN_STEP, backend, by_name, largest_difference, make_rows, model_folder
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from postroad.config.algorithm import AlgorithmSection
from postroad.config.parallel import ParallelSection
from postroad_trainer.backend import BackendError, BackendSettings, MegatronBackend, cpu_shim
from postroad_trainer.backend.determinism import make_deterministic
from postroad_trainer.backend.settings import validate_model
from postroad_trainer.batch import RowError, StepSettings, TrainRow
from postroad_trainer.models import family_of, read_configuration


def _reference(
    folder: Path, rows: list[TrainRow], settings: StepSettings
) -> tuple[dict[str, torch.Tensor], list[Any], float]:
    """Gradients, log-probabilities and mean |difference| by transformers, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = sum(int(row.loss_mask.sum()) for row in rows)
    logprobs, gap = [], 0.0
    for row in rows:
        tokens, mask = torch.from_numpy(row.tokens.astype(np.int64)), torch.from_numpy(row.loss_mask.astype(bool))
        all_logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1] / settings.temperature, -1)
        current = all_logprobs.gather(1, tokens[1:, None])[:, 0][mask[1:]]
        difference = current.detach() - torch.from_numpy(row.logprobs)[mask]
        algorithm = settings.algorithm
        weight = difference.exp().clamp(max=algorithm.weight_high) if algorithm.correction == "tis" else 1.0
        share = {
            "token": 1 / trained,
            "sample": 1 / len(rows) / int(mask.sum()),
            "constant": 1 / len(rows) / (algorithm.constant_length or 1),
        }[algorithm.reducer]
        (-row.advantage * share * weight * current).sum().backward()
        gap += float(difference.abs().sum())
        logprobs.append(torch.zeros(len(tokens)).masked_scatter(mask, current.detach()).numpy())
    return {name: value.grad for name, value in model.named_parameters()}, logprobs, gap / trained


STEPS = [
    FROZEN_STEP,
    dataclasses.replace(FROZEN_STEP, algorithm=AlgorithmSection(name="grpo", correction="none"), temperature=0.7),
    dataclasses.replace(FROZEN_STEP, algorithm=AlgorithmSection(name="dr_grpo", constant_length=16, weight_high=1.1)),
]


@pytest.mark.parametrize("settings", STEPS, ids=lambda settings: settings.algorithm.name)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gradients_and_metrics_are_those_of_transformers(tmp_path: Path, kind: str, settings: StepSettings) -> None:
    folder, rows = model_folder(tmp_path, kind), make_rows()
    gradients, logprobs, gap = _reference(folder, rows, settings)
    ours = backend(folder, micro_batch_tokens=60)
    result = ours.train_step(rows, settings)
    assert largest_difference(by_name(ours), gradients) < 1e-5
    assert result.logprob_abs_diff_mean == pytest.approx(gap, abs=1e-5)
    assert result.grad_norm == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in gradients.values())), rel=1e-4)
    got = ours.logprobs(rows, settings.temperature)
    assert max(float(np.abs(a - b).max()) for a, b in zip(got, logprobs, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_sharing_prompts_changes_neither_loss_nor_gradients(tmp_path: Path, kind: str) -> None:
    folder, rows = model_folder(tmp_path, kind), make_rows(members=5)
    separate, shared = backend(folder, share_prompts=False), backend(folder)
    alone, together = separate.train_step(rows, FROZEN_STEP), shared.train_step(rows, FROZEN_STEP)
    assert together.computed_tokens < 0.75 * alone.computed_tokens
    assert together.loss == pytest.approx(alone.loss, abs=1e-6)
    assert together.entropy == pytest.approx(alone.entropy, abs=1e-5)
    assert largest_difference(by_name(shared), by_name(separate)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"tree_tokens": 20},
        {"parallel": {"recompute": "full"}, "micro_batch_tokens": 40},
        {"parallel": {"recompute": "selective"}},
    ],
)
def test_how_a_batch_is_cut_does_not_change_the_gradients(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, rows = model_folder(tmp_path), make_rows()
    whole, cut = backend(folder), backend(folder, **changes)
    whole.train_step(rows, FROZEN_STEP)
    cut.train_step(rows, FROZEN_STEP)
    assert largest_difference(by_name(cut), by_name(whole)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_raise_the_probability_of_what_was_good(tmp_path: Path, dtype: str) -> None:
    ours = backend(model_folder(tmp_path), dtype=dtype)
    rows = [dataclasses.replace(row, advantage=1.0 if int(row.sample_id[-1]) == 0 else -0.3) for row in make_rows()]
    good = [index for index, row in enumerate(rows) if row.advantage > 0]
    before, digest = ours.logprobs(rows), ours.digest()
    for _ in range(8):
        assert not ours.train_step(rows, StepSettings(learning_rate=2e-3)).skipped
    after = ours.logprobs(rows)
    assert sum(float(after[i].sum() - before[i].sum()) for i in good) > 5
    assert ours.digest() != digest


def test_bfloat16_is_near_float32_and_keeps_float32_masters(tmp_path: Path) -> None:
    folder, rows = model_folder(tmp_path), make_rows()
    exact, rounded = backend(folder), backend(folder, dtype="bfloat16")
    wanted, got = exact.train_step(rows, FROZEN_STEP), rounded.train_step(rows, FROZEN_STEP)
    assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in by_name(rounded).values())
    assert all(master.dtype == torch.float32 for master in by_name(rounded, "main_param").values())
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in rounded.export_weights())


def test_a_frozen_embedding_stays(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path), freeze_embedding=True)
    before = {name: tensor.clone() for name, tensor in ours.export_weights()}
    ours.train_step(make_rows(), StepSettings(learning_rate=1e-3))
    changed = {name for name, tensor in ours.export_weights() if not torch.equal(tensor, before[name])}
    assert changed == set(before) - {"model.embed_tokens.weight"}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_behind_a_frozen_embedding_keeps_every_gradient(tmp_path: Path, recompute: str) -> None:
    folder, rows = model_folder(tmp_path), make_rows()
    plain, again = (backend(folder, {"recompute": mode}, freeze_embedding=True) for mode in ("none", recompute))
    for one in (plain, again):
        one.train_step(rows, FROZEN_STEP)
    assert min(float(gradient.abs().max()) for gradient in by_name(again).values()) > 0
    assert largest_difference(by_name(plain), by_name(again)) < 1e-6


def test_rows_without_advantage_are_not_run_but_counted(tmp_path: Path) -> None:
    folder, rows = model_folder(tmp_path), make_rows()
    rows = [dataclasses.replace(row, advantage=0.0) if index % 2 else row for index, row in enumerate(rows)]
    gradients, _, _ = _reference(folder, rows, FROZEN_STEP)
    ours = backend(folder)
    result = ours.train_step(rows, FROZEN_STEP)
    assert result.rows_skipped == len(rows) // 2 and result.rows == len(rows)
    assert largest_difference(by_name(ours), gradients) < 1e-5


def test_a_row_without_a_trained_token_is_not_run_but_counted(tmp_path: Path) -> None:
    folder, rows = model_folder(tmp_path), make_rows()
    masked = [dataclasses.replace(rows[0], loss_mask=np.zeros_like(rows[0].loss_mask)), *rows[1:]]
    results = [backend(folder).train_step(which, FROZEN_STEP) for which in (masked, rows[1:])]
    assert [result.rows_masked for result in results] == [1, 0] and results[0].rows_skipped == 1
    assert results[0].loss == pytest.approx(results[1].loss) and results[0].scores[0] is None
    assert not backend(folder).logprobs(masked)[0].any()


def test_terms_beside_the_advantage_need_every_row(tmp_path: Path) -> None:
    """Divergence from the reference and entropy, against torch on the logits of transformers."""
    folder, chosen = (
        model_folder(tmp_path),
        AlgorithmSection(kl_loss_coefficient=0.3, kl_kind="k2", entropy_coefficient=0.2),
    )
    ours = MegatronBackend(BackendSettings(folder, dtype="float32"), keep_reference=True)
    ours.train_step(make_rows(), StepSettings(1e-2))  # away from the reference
    folder_now = tmp_path / "now"
    shutil.copytree(folder, folder_now)
    save_file({name: tensor.clone() for name, tensor in ours.export_weights()}, folder_now / "model.safetensors")
    rows = [dataclasses.replace(row, advantage=0.0) for row in make_rows()]
    reference = ours.logprobs(rows, reference=True)
    assert largest_difference(dict(backend(folder_now).export_weights()), dict(ours.export_weights())) == 0
    rows = [dataclasses.replace(r, scores={"reference": s}) for r, s in zip(rows, reference, strict=True)]
    result = ours.train_step(rows, StepSettings(0.0, chosen, grad_clip=0.0))
    model, initial = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder_now, folder))
    trained, loss = sum(int(row.loss_mask.sum()) for row in rows), torch.zeros(())
    for row in rows:
        tokens, mask = torch.from_numpy(row.tokens.astype(np.int64)), torch.from_numpy(row.trained)[1:]
        policies = [
            torch.distributions.Categorical(logits=which(tokens[None]).logits[0, :-1]) for which in (model, initial)
        ]
        current, base = (policy.log_prob(tokens[1:])[mask] for policy in policies)
        divergence = (current - base.detach()).square().sum() / 2
        loss = loss + (0.3 * divergence - 0.2 * policies[0].entropy()[mask].sum()) / trained
    loss.backward()
    assert result.rows_skipped == 0 and result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert largest_difference(by_name(ours), gradients) < 1e-5


def test_a_step_without_advantages_touches_nothing(tmp_path: Path) -> None:
    touched, untouched = (backend(model_folder(tmp_path)) for _ in range(2))
    rows = make_rows()
    result = touched.train_step([dataclasses.replace(row, advantage=0.0) for row in rows], StepSettings(1e-3))
    assert result.skipped and result.grad_norm is None and result.rows_skipped == len(rows)
    for one in (touched, untouched):
        one.train_step(rows, StepSettings(1e-3))
    assert touched.digest() == untouched.digest()


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    broken, whole = (backend(model_folder(tmp_path)) for _ in range(2))
    rows, settings = make_rows(), StepSettings(1e-3)
    digest = broken.digest()
    bad = [dataclasses.replace(rows[0], advantage=1e38), *rows[1:]]
    result = broken.train_step(bad, dataclasses.replace(settings, algorithm=AlgorithmSection(correction="none")))
    assert result.skipped and result.gradients_not_finite == 1 and "gradient norm" in (result.skip_reason or "")
    assert broken.digest() == digest
    for one in (broken, whole):
        assert not one.train_step(rows, settings).skipped
    assert broken.digest() == whole.digest()


def test_gradients_do_not_leak_into_the_next_step(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path))
    norms = [ours.train_step(make_rows(), FROZEN_STEP).grad_norm for _ in range(3)]
    assert norms[0] == norms[1] == norms[2]


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path))
    result = ours.train_step(make_rows(), StepSettings(learning_rate=0.0, grad_clip=0.01))
    clipped = math.sqrt(sum(float((gradient**2).sum()) for gradient in by_name(ours).values()))
    assert result.grad_norm is not None and result.grad_norm > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_a_backend_may_be_built_in_one_thread_and_run_in_another(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path))
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(ours.train_step(make_rows(), StepSettings(1e-3))))
    thread.start()
    thread.join(60)
    assert results and not results[0].skipped


def test_without_megatron_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_shim, "_ready", False)
    monkeypatch.setattr(cpu_shim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install --no-deps --ignore-requires-python megatron-core==0.19.2"):
        backend(model_folder(tmp_path))


def _changed(**changes: Any) -> list[TrainRow]:
    first, *rest = make_rows()
    return [dataclasses.replace(first, **changes), *rest]


FIRST = make_rows()[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"advantage": math.nan}, "sample '0/0': an advantage is nan"),
        ({"scores": {"old": np.full(len(FIRST.tokens), np.nan, np.float32)}}, "the old log-probabilities"),
        ({"loss_mask": np.ones_like(FIRST.loss_mask)}, "token 0 is trained"),
        ({"tokens": np.full_like(FIRST.tokens, 4000)}, "token id 4000 is outside the vocabulary of 100"),
        ({"tokens": np.full_like(FIRST.tokens, -1)}, "token id -1 is outside"),
        ({"logprobs": FIRST.logprobs[:-1]}, "must have one shape"),
        ({"logprobs": np.full_like(FIRST.logprobs, np.nan)}, "engine log-probability"),
        ({"routed_experts": np.zeros((3, 2, 2), np.uint8)}, "one row per token that was an input"),
        ({"routed_experts": np.zeros((len(FIRST.tokens) - 1, 2, 2), np.uint8)}, "no MoE layer"),
    ],
)
def test_a_row_that_can_not_be_trained_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    ours = backend(model_folder(tmp_path))
    with pytest.raises(RowError, match=sentence):
        ours.train_step(_changed(**changes), StepSettings(1e-3))


def test_a_row_longer_than_a_micro_batch_is_refused(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path), micro_batch_tokens=6)
    with pytest.raises(RowError, match="more than the 6 a micro-batch may hold"):
        ours.train_step(make_rows(), StepSettings(1e-3))
    with pytest.raises(BackendError, match="at least one row"):
        ours.train_step([], StepSettings(1e-3))


@pytest.mark.parametrize(("changes", "sentence"), [({"dtype": "float16"}, "float16"), ({"threads": 0}, "at least 1")])
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BackendError, match=sentence):
        BackendSettings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("world", "changes", "sentence"),
    [
        (3, {"tensor": 2}, "trainer.processes 3 can't .* make it a multiple of 2"),
        (4, {"pipeline": 2, "expert": 4}, "the 2 ranks of a pipeline stage can't be laid out as expert 4"),
        (2, {"sequence_parallel": True}, "sequence_parallel splits over the tensor ranks"),
        (2, {"virtual_pipeline": 2}, "virtual_pipeline needs a pipeline"),
    ],
)
def test_a_layout_that_does_not_divide_the_world_is_refused(world: int, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ParallelSection(**changes).validate_world(world)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("llama", {"tensor": 4}, "num_query_groups 2 is not a multiple of trainer.parallel.tensor 4"),
        ("llama", {"pipeline": 2}, "num_layers 3 is not a multiple"),
        ("llama", {"expert": 2}, "no experts"),
        ("qwen3_moe", {"expert": 3}, "num_moe_experts 8 is not a multiple of trainer.parallel.expert 3"),
        ("qwen3_moe", {"tensor": 2}, "need trainer.parallel.sequence_parallel"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], sentence: str
) -> None:
    configuration = read_configuration(model_folder(tmp_path, kind))
    with pytest.raises(BackendError, match=sentence):
        validate_model(ParallelSection(**changes), family_of(configuration).arguments(configuration))


def test_an_environment_that_contradicts_determinism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(BackendError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0', which trainer.parallel.deterministic"):
        make_deterministic()


def test_long_rows_attend_as_transformers_does(tmp_path: Path) -> None:
    """From some length on the CPU's attention is torch's own, where every tree is one sequence."""
    random, folder = np.random.default_rng(0), model_folder(tmp_path, "qwen3")
    rows = []
    for number, length in enumerate((300, 140)):
        tokens = random.integers(3, 90, length).astype(np.int32)
        mask = (np.arange(length) > 20).astype(np.uint8)
        rows.append(
            TrainRow(str(number), str(number), tokens, mask, (-4.0 * mask).astype(np.float32), 1.0 - 3 * number)
        )
    gradients, logprobs, _ = _reference(folder, rows, FROZEN_STEP)
    ours = backend(folder)
    got = ours.logprobs(rows)
    assert max(float(np.abs(a - b).max()) for a, b in zip(got, logprobs, strict=True)) < 1e-5
    ours.train_step(rows, FROZEN_STEP)
    assert largest_difference(by_name(ours), gradients) < 1e-5


def test_interleaved_stages_without_overlapped_transfers_are_refused(tmp_path: Path) -> None:
    backend(model_folder(tmp_path))
    from postroad_trainer.backend.construction import check_interleaving

    config = SimpleNamespace(virtual_pipeline_model_parallel_size=2, overlap_p2p_comm=False, batch_p2p_comm=True)
    with pytest.raises(BackendError, match="overlap_p2p_comm"):
        check_interleaving(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": math.inf},
        {"temperature": 0.0},
        {"grad_clip": -1.0},
    ],
)
def test_step_settings_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        StepSettings(**{"learning_rate": 1e-3, **changes})
