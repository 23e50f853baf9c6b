"""Tiny model folders and the mappings of every family, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backend_parts import backend, logits_of, model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from postroad_trainer.models import ModelError, read_configuration
from postroad_trainer.models.tiny import CHARACTERS
from postroad_trainer.models.weights import digest_of

KINDS = ["llama", "llama_untied", "qwen3", "qwen3_moe"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_and_export_gives_back_the_file(tmp_path: Path, kind: str) -> None:
    folder = model_folder(tmp_path, kind)
    ours = backend(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(0, 90, 40)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)[None]).logits[0]
    assert float(wanted.std()) > 0.1
    assert float((logits_of(ours, tokens) - wanted).abs().max()) < 1e-4
    exported, file = dict(ours.export_weights()), load_file(folder / "model.safetensors")
    assert set(exported) == set(file)
    assert all(torch.equal(exported[name], file[name]) for name in file)
    assert ours.digest() == digest_of(file.items())


def test_the_digest_is_of_the_weights_and_not_of_their_order() -> None:
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    digest = digest_of(tensors.items())
    assert digest == digest_of(reversed(list(tensors.items())))
    assert digest != digest_of({**tensors, "b": torch.arange(4.0).reshape(2, 2)}.items())
    assert digest != digest_of({**tensors, "b": -torch.arange(4.0)}.items())


def test_a_tiny_folder_has_a_tokenizer_that_writes_what_it_reads(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder(tmp_path))
    assert len(tokenizer) <= 300
    ids = tokenizer.encode(CHARACTERS, add_special_tokens=False)
    assert len(ids) == len(CHARACTERS) and tokenizer.decode(ids) == CHARACTERS
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 3"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\n2 + 3<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1 and ids.count(2) == 1 and tokenizer.eos_token_id == 2


def test_the_same_seed_writes_the_same_model(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not known.*LlamaForCausalLM.*Qwen3MoeForCausalLM"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope type 'yarn'"),
        ({"num_hidden_layers": 4}, "no tensor model.layers.3"),
        ({"intermediate_size": 128}, "config.json asks for"),
    ],
)
def test_a_model_that_can_not_be_used_is_refused(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    folder = model_folder(tmp_path)
    _edit(folder, **changes)
    with pytest.raises(ModelError, match=sentence):
        backend(folder)


def test_the_rotary_base_is_found_in_both_places(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    _edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert read_configuration(folder).rope_theta == 500.0
    _edit(folder, rope_parameters=None, rope_theta=700.0)
    assert read_configuration(folder).rope_theta == 700.0


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or cut short"):
        backend(folder)
    weights.unlink()
    with pytest.raises(ModelError, match="neither"):
        backend(folder)
    with pytest.raises(ModelError, match="model_path must be"):
        read_configuration(tmp_path / "nowhere")


def test_a_sharded_folder_is_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    whole = backend(folder).digest()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert backend(folder).digest() == whole
