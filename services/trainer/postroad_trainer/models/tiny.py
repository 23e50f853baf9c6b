"""Writes a random model as a Hugging Face folder: `python -m postroad_trainer.models.tiny --out DIR --kind llama`.

Tiny ones for CPUs, and two of the shape of real ones for GPUs that reach no hub. The vocabulary is one id per printable
ASCII character, newline and tab, and the chat tokens. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from postroad.config.shapes import tensors_of

Kind = Literal["llama", "llama_untied", "qwen3", "qwen3_moe", "qwen3_600m", "qwen3_moe_900m"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "\n\t" + "".join(chr(code) for code in range(32, 127))
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNKNOWN = "?"


def write_tiny_model(folder: Path, kind: Kind, seed: int = 0, changes: Mapping[str, Any] | None = None) -> None:
    """Writes config.json (with these changes), model.safetensors and the tokenizer into folder, made if needed."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; {', '.join(get_args(Kind))} expected")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    configuration = {**_configuration(kind, vocabulary), **(changes or {})}
    (folder / "config.json").write_text(json.dumps(configuration, indent=2))
    generation = {key: configuration[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    save_file(_weights(configuration, seed), folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> int:
    """Writes the character tokenizer; returns its number of ids."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return len(vocabulary)


def _size(hidden: int, inner: int, layers: int, heads: tuple[int, int, int]) -> dict[str, int]:
    """heads: of queries, of keys and values, and the width of one."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            **dict(zip(names, heads, strict=True))}  # fmt: skip


SIZES: dict[Kind, dict[str, int]] = {
    "llama": _size(96, 256, 3, (4, 2, 24)),
    "llama_untied": _size(96, 256, 3, (4, 2, 24)),
    "qwen3": _size(96, 256, 3, (4, 2, 24)),
    "qwen3_moe": _size(64, 128, 2, (4, 2, 16)),
    "qwen3_600m": _size(1024, 3072, 28, (16, 8, 128)),  # Qwen3-0.6B but for its vocabulary
    "qwen3_moe_900m": _size(1024, 3072, 16, (16, 4, 128)),
}
EXPERTS: dict[Kind, tuple[int, int, int]] = {"qwen3_moe": (8, 2, 64), "qwen3_moe_900m": (32, 4, 512)}  # all, top, width
LARGE = ("qwen3_600m", "qwen3_moe_900m")


def _configuration(kind: Kind, vocabulary: int) -> dict[str, Any]:
    moe = kind in EXPERTS
    family = "llama" if kind.startswith("llama") else "qwen3_moe" if moe else "qwen3"
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    configuration: dict[str, Any] = {
        "architectures": [names[family]],
        "model_type": family,
        "vocab_size": vocabulary,
        **SIZES[kind],
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": kind == "llama",
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16" if kind in LARGE else "float32",
    }
    if moe:
        experts, top, width = EXPERTS[kind]
        configuration |= {
            "num_experts": experts,
            "num_experts_per_tok": top,
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return configuration


def _weights(configuration: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Norms 1; matrices normal, scaled by their inputs so that two or three layers already carry a signal."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, configuration["dtype"])
    weights = {}
    for tensor in tensors_of(configuration):
        name, shape = tensor.name, tensor.shape
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=dtype)
        else:
            scale = configuration["initializer_range"] if "embed" in name else 0.7 / math.sqrt(shape[1])
            weights[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=get_args(Kind), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_tiny_model(arguments.out, arguments.kind, arguments.seed)


if __name__ == "__main__":
    main()
