"""Checkpoints: exact resume, and a clear refusal of what is damaged or belongs elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_parts import backend, make_rows, model_folder
from safetensors.torch import load_file

from postroad_trainer.backend import BackendError
from postroad_trainer.batch import StepSettings

STEP = StepSettings(learning_rate=1e-3)


def _train(trained: Any, seeds: range) -> None:
    for seed in seeds:
        assert not trained.train_step(make_rows(seed=seed), STEP).skipped


@pytest.mark.parametrize(
    ("kind", "dtype", "frozen"),
    [("llama", "bfloat16", True), ("llama", "float32", False), ("qwen3_moe", "bfloat16", False)],
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_resume_is_exact(tmp_path: Path, kind: str, dtype: str, frozen: bool, steps_before: int) -> None:
    folder = model_folder(tmp_path, kind)
    first = backend(folder, dtype=dtype, freeze_embedding=frozen)
    _train(first, range(steps_before))
    first.save(tmp_path / "checkpoint")
    saved = first.digest()
    torch.rand(3)
    _train(first, range(10, 13))

    resumed = backend(model_folder(tmp_path, kind, seed=1), dtype=dtype, freeze_embedding=frozen)
    _train(resumed, range(1))
    resumed.load(tmp_path / "checkpoint")
    assert resumed.digest() == saved
    _train(resumed, range(10, 13))
    assert resumed.digest() == first.digest()
    for one, name in ((first, "a"), (resumed, "b")):
        one.save(tmp_path / name)
    left, right = (load_file(tmp_path / name / "rank-00000.safetensors") for name in "ab")
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left if not name.startswith("random/"))


def test_the_random_generators_come_back(tmp_path: Path) -> None:
    ours = backend(model_folder(tmp_path))
    ours.save(tmp_path / "checkpoint")
    drawn = torch.rand(4)
    ours.load(tmp_path / "checkpoint")
    assert torch.equal(torch.rand(4), drawn)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    ours = backend(model_folder(tmp_path))
    _train(ours, range(1))
    ours.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _refusal(tmp_path: Path, checkpoint: Path, kind: str = "llama", **settings: Any) -> str:
    """What a fresh backend says when it is asked to load the checkpoint; it must be left as it was."""
    other = backend(model_folder(tmp_path, kind), **settings)
    digest = other.digest()
    with pytest.raises(BackendError) as refused:
        other.load(checkpoint)
    assert other.digest() == digest
    return str(refused.value)


def test_a_cut_file_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged or cut short" in _refusal(tmp_path, checkpoint)
    file.write_bytes(b"")
    assert "damaged or cut short" in _refusal(tmp_path, checkpoint)
    file.unlink()
    assert "not whole" in _refusal(tmp_path, checkpoint)


def test_a_changed_byte_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "does not have its checksum" in _refusal(tmp_path, checkpoint)


def test_a_cut_description_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.json"
    file.write_text(file.read_text()[:50])
    assert "rank-00000.json is damaged or cut short" in _refusal(tmp_path, checkpoint)
    file.unlink()
    assert "no checkpoint, or not whole" in _refusal(tmp_path, checkpoint)


def test_another_model_dtype_or_world_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    sentence = "architecture is 'LlamaForCausalLM', this trainer's is 'Qwen3MoeForCausalLM'"
    assert sentence in _refusal(tmp_path, checkpoint, "qwen3_moe")
    assert "dtype is 'float32', this trainer's is 'bfloat16'" in _refusal(tmp_path, checkpoint, dtype="bfloat16")
    assert "frozen is 0" in _refusal(tmp_path, checkpoint, freeze_embedding=True)
    file = checkpoint / "rank-00000.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ranks": 2}))
    assert "rank-00001.json does not exist" in _refusal(tmp_path, checkpoint)
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 9}))
    assert "format 9" in _refusal(tmp_path, checkpoint)


def test_a_checkpoint_is_not_overwritten_and_a_broken_attempt_is_cleared(tmp_path: Path, checkpoint: Path) -> None:
    ours = backend(model_folder(tmp_path))
    with pytest.raises(BackendError, match="never overwrites"):
        ours.save(checkpoint)
    (tmp_path / "next.writing").mkdir()
    (tmp_path / "next.writing" / "left-over").write_text("")
    ours.save(tmp_path / "next")
    assert sorted(path.name for path in (tmp_path / "next").iterdir()) == ["rank-00000.json", "rank-00000.safetensors"]
