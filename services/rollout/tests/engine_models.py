"""Tiny models with random weights, as transformers makes them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip

COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 128, "eos_token_id": 1,
    "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"tie_word_embeddings": False, **MOE}),
}


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    config, model, keywords = KINDS[kind]
    torch.manual_seed(seed)
    return model(config(**COMMON, **keywords)).float().eval()


def write_tokenizer(folder: Path) -> None:
    """One printable character a token, beside the model."""
    alphabet = {chr(33 + number): number for number in range(COMMON["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
