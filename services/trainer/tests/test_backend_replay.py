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
    own = [
        dataclasses.replace(row, routed_experts=kept) for row, kept in zip(rows, free.record_experts(rows), strict=True)
    ]
    without, with_replay = free.train_step(rows, FROZEN_STEP), replayed.train_step(own, FROZEN_STEP)
    assert without.experts_differ_fraction is None
    assert with_replay.experts_differ_fraction == 0.0
    assert largest_difference(by_name(replayed), by_name(free)) < 1e-6
    assert with_replay.experts_unknown == 0
    other = own[0].routed_experts.copy()  # type: ignore[union-attr]
    other[-1, 0, 0] = next(expert for expert in range(EXPERTS) if expert not in other[-1, 0])
    changed = replayed.train_step([dataclasses.replace(own[0], routed_experts=other), *own[1:]], FROZEN_STEP)
    assert changed.experts_differ_fraction is not None and 0 < changed.experts_differ_fraction < 0.1


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


@pytest.mark.parametrize("layout", [{}, {"recompute": "full"}])
def test_replay_gives_the_recording_pass_bit_for_bit(tmp_path: Path, layout: dict[str, Any]) -> None:
    ours = backend(model_folder(tmp_path, "qwen3_moe"), layout, share_prompts=False)
    rows, free = make_rows(), ours.logprobs(make_rows())
    recorded = [
        dataclasses.replace(row, routed_experts=kept) for row, kept in zip(rows, ours.record_experts(rows), strict=True)
    ]
    ours.train_step(_rows(seed=5), FROZEN_STEP)  # other experts in between leave nothing behind
    assert all(np.array_equal(a, b) for a, b in zip(free, ours.logprobs(recorded), strict=True))


def _shifted(experts: np.ndarray, axis: str) -> np.ndarray:
    """One layer's experts come from the layer before, or one token's from the token before."""
    other = experts.copy()
    if axis == "layer":
        other[:, 1] = experts[:, 0]
    else:
        other[2] = experts[1]
    return other


@pytest.mark.parametrize("axis", ["layer", "token"])
def test_a_shift_by_one_layer_or_token_is_seen(tmp_path: Path, axis: str) -> None:
    ours = backend(model_folder(tmp_path, "qwen3_moe"))
    row = _rows()[0]
    shifted = dataclasses.replace(row, routed_experts=_shifted(row.routed_experts, axis))
    assert float(np.abs(ours.logprobs([row])[0] - ours.logprobs([shifted])[0]).max()) > 1e-3


def test_where_nothing_is_recorded_the_router_chooses_once(tmp_path: Path) -> None:
    """A partly unknown recording, filled by the trainer, is the recording with the trainer's choice written in."""
    folder = model_folder(tmp_path, "qwen3_moe")
    ours, filled = backend(folder, FULL, share_prompts=False), backend(folder, FULL, share_prompts=False)
    first, *rest = _rows()
    partly = first.routed_experts.copy()  # type: ignore[union-attr]
    partly[2:] = 255
    rows = [
        dataclasses.replace(first, routed_experts=partly),
        dataclasses.replace(rest[0], routed_experts=None),
        *rest[1:],
    ]
    result = ours.train_step(rows, FROZEN_STEP)
    assert result.experts_unknown == len(partly) - 2 + len(rest[0].tokens) - 1
    assert result.rows_unrouted == 0 and result.experts_differ_fraction is not None
    own = filled.record_experts([rest[0]])[0]
    rows[1] = dataclasses.replace(rest[0], routed_experts=own)
    assert filled.train_step(rows, FROZEN_STEP).experts_unknown == len(partly) - 2
    assert largest_difference(by_name(ours), by_name(filled)) < 1e-6


def test_rows_without_a_recording_are_left_out_if_the_recipe_says_so(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "qwen3_moe")
    masked, without = backend(folder, unknown_experts="mask"), backend(folder)
    result = masked.train_step(_first_with(None), FROZEN_STEP)
    assert result.rows_unrouted == 1 and result.experts_unknown == LENGTH
    dropped = [dataclasses.replace(row, advantage=0.0) if number == 0 else row for number, row in enumerate(_rows())]
    without.train_step(dropped, FROZEN_STEP)
    assert largest_difference(by_name(masked), by_name(without)) < 1e-6
    nothing = masked.train_step(
        [
            dataclasses.replace(_rows()[0], routed_experts=np.full((LENGTH, 2, 2), 255, np.uint8)),
            *[dataclasses.replace(row, advantage=0.0) for row in _rows()[1:]],
        ],
        FROZEN_STEP,
    )
    assert nothing.skipped and "1 lack recorded experts" in (nothing.skip_reason or "")
