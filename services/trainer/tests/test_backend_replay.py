"""Routing replay: the recorded experts decide, against transformers with forced experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_parts import FROZEN_STEP, backend, by_name, largest_difference, make_rows, model_folder
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from postroad_trainer.backend import BackendError
from postroad_trainer.batch import RowError, StepSettings, TrainRow

LAYERS, TOPK, EXPERTS = 2, 2, 8


def _rows(**changes: Any) -> list[TrainRow]:
    return make_rows(experts=(LAYERS, TOPK, EXPERTS), **changes)


def _forced(folder: Path, rows: list[TrainRow], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Gradients by transformers with the recorded experts, under the names of the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    forced: dict[Any, torch.Tensor] = {}

    def forward(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        scores = logits.softmax(-1).gather(1, forced[self])
        return logits, scores / scores.sum(-1, keepdim=True), forced[self]

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", forward)
    trained = sum(int(row.loss_mask.sum()) for row in rows)
    for row in rows:
        assert row.routed_experts is not None
        for layer in range(LAYERS):
            forced[model.model.layers[layer].mlp.gate] = torch.from_numpy(row.routed_experts[:, layer].astype(np.int64))
        tokens, mask = torch.from_numpy(row.tokens.astype(np.int64)), torch.from_numpy(row.loss_mask.astype(bool))
        current = torch.log_softmax(model(tokens[None, :-1]).logits[0], -1).gather(1, tokens[1:, None])[:, 0][mask[1:]]
        weight = (current.detach() - torch.from_numpy(row.logprobs)[mask]).exp().clamp(max=2.0)
        (-row.advantage / trained * weight * current).sum().backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        head, packed, part = name.partition("mlp.experts.")
        if not packed:
            gradients[name] = parameter.grad
            continue
        for expert, gradient in enumerate(parameter.grad):
            names, values = (
                (("gate_proj", "up_proj"), gradient.chunk(2)) if "gate_up" in part else (("down_proj",), (gradient,))
            )
            pieces = zip(names, values, strict=True)
            gradients |= {f"{head}mlp.experts.{expert}.{piece}.weight": value for piece, value in pieces}
    return gradients


FULL = {"recompute": "full"}
CUTS = [
    {},
    {"parallel": FULL},
    {"parallel": FULL, "micro_batch_tokens": 40},
    {"parallel": {"recompute": "selective"}},
    {"share_prompts": False},
]


@pytest.mark.parametrize("changes", CUTS)
def test_recorded_experts_decide_in_forward_recompute_and_backward(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = model_folder(tmp_path, "qwen3_moe"), _rows()
    ours = backend(folder, **changes)
    result = ours.train_step(rows, FROZEN_STEP)
    assert largest_difference(by_name(ours), _forced(folder, rows, monkeypatch)) < 1e-5
    assert result.experts_differ_fraction is not None and result.experts_differ_fraction > 0.8  # random choices
    assert result.prompts_not_shared == 0


def test_replaying_the_own_choice_changes_nothing(tmp_path: Path) -> None:
    free, replayed = (backend(model_folder(tmp_path, "qwen3_moe")) for _ in range(2))
    rows = make_rows()
    own = [dataclasses.replace(row, routed_experts=_own_choice(free, row)) for row in rows]
    without, with_replay = free.train_step(rows, FROZEN_STEP), replayed.train_step(own, FROZEN_STEP)
    assert without.experts_differ_fraction is None
    assert with_replay.experts_differ_fraction == 0.0
    assert largest_difference(by_name(replayed), by_name(free)) < 1e-6
    other = own[0].routed_experts.copy()  # type: ignore[union-attr]
    other[-1, 0, 0] = next(expert for expert in range(EXPERTS) if expert not in other[-1, 0])
    changed = replayed.train_step([dataclasses.replace(own[0], routed_experts=other), *own[1:]], FROZEN_STEP)
    assert changed.experts_differ_fraction is not None and 0 < changed.experts_differ_fraction < 0.1


def _own_choice(ours: Any, row: TrainRow) -> np.ndarray:
    """[T-1, layers, topk]: what the model's routers choose for this row."""
    chosen = []

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        chosen.append(outputs[1].nonzero()[:, 1].reshape(-1, TOPK).numpy())

    handles = [layer.mlp.router.register_forward_hook(keep) for layer in ours._chunks[0].decoder.layers]
    padded = np.append(row.tokens, row.tokens[-1])  # the last token is no input: one more makes the last kept one
    mask = np.zeros(len(padded), np.uint8)
    mask[-1] = 1
    ours.logprobs([dataclasses.replace(row, tokens=padded, loss_mask=mask, logprobs=np.zeros(len(padded), np.float32))])
    for handle in handles:
        handle.remove()
    return np.stack(chosen, 1)[: len(row.tokens) - 1].astype(np.uint8)


def test_a_prompt_recorded_otherwise_is_counted_and_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = model_folder(tmp_path, "qwen3_moe"), _rows()
    other = rows[2].routed_experts.copy()  # type: ignore[union-attr]
    other[0, 0] = (other[0, 0] + 1) % EXPERTS
    rows[2] = dataclasses.replace(rows[2], routed_experts=other)
    ours = backend(folder)
    result = ours.train_step(rows, FROZEN_STEP)
    assert result.prompts_not_shared == 1
    assert largest_difference(by_name(ours), _forced(folder, rows, monkeypatch)) < 1e-5


def test_replay_leaves_nothing_behind(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path, "qwen3_moe"), FULL)
    before = ours.logprobs(make_rows())
    ours.train_step(_rows(), FROZEN_STEP)
    assert all(not replay.replay_backward_list for replay in ours._replays[0].rows.values())
    assert all(np.array_equal(a, b) for a, b in zip(before, ours.logprobs(make_rows()), strict=True))


def _first_with(experts: np.ndarray | None) -> list[TrainRow]:
    first, *rest = _rows()
    return [dataclasses.replace(first, routed_experts=experts), *rest]


LENGTH = len(_rows()[0].tokens) - 1


@pytest.mark.parametrize(
    ("experts", "sentence"),
    [
        (np.zeros((LENGTH, 3, 2), np.uint8), "for 3 layers of 2 experts; the model has 2"),
        (np.full((LENGTH, 2, 2), [0, 8], np.uint8), "expert 8 was routed to"),
        (np.zeros((LENGTH, 2, 2), np.uint8), "twice to one expert"),
        (np.full((LENGTH, 2, 2), [0, 1], np.int64), "uint8 or uint16"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(tmp_path: Path, experts: np.ndarray, sentence: str) -> None:
    with pytest.raises(RowError, match=sentence):
        backend(model_folder(tmp_path, "qwen3_moe")).train_step(_first_with(experts), StepSettings(1e-3))


def test_a_step_replays_all_rows_or_none(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="11 of 12 rows carry routed experts"):
        backend(model_folder(tmp_path, "qwen3_moe")).train_step(_first_with(None), StepSettings(1e-3))
