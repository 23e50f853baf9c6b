"""The parts that families share: megatron's arguments for a dense decoder and the layout of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from postroad_trainer.models.configuration import ModelConfiguration

Kind = Literal["plain", "qkv", "gate_up"]


@dataclass(frozen=True)
class Entry:
    """One megatron parameter and the Hugging Face tensors that it holds."""

    parameter: torch.nn.Parameter
    kind: Kind
    names: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """An architecture: `arguments` gives TransformerConfig's keyword arguments, `entries` walks a built GPTModel."""

    architecture: str
    arguments: Callable[[ModelConfiguration], dict[str, Any]]
    entries: Callable[[Any], Iterator[Entry]]


def dense_arguments(configuration: ModelConfiguration) -> dict[str, Any]:
    """What every decoder here has in common: RMSNorm, rotary, SwiGLU, no biases, no dropout."""
    configuration.require("hidden_act", "silu", "silu")
    configuration.require("attention_bias", False, False)
    configuration.require("attention_dropout", 0.0, 0.0)
    heads = configuration.integer("num_attention_heads")
    return {
        "num_layers": configuration.integer("num_hidden_layers"),
        "hidden_size": configuration.integer("hidden_size"),
        "ffn_hidden_size": configuration.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": int(configuration.values.get("num_key_value_heads") or heads),
        "kv_channels": configuration.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": float(configuration.values.get("rms_norm_eps", 1e-6)),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def decoder_entries(model: Any, feed_forward: Callable[[Any, str], Iterator[Entry]]) -> Iterator[Entry]:
    """Every parameter of one GPTModel chunk, in Hugging Face's order of layers."""
    if model.pre_process:
        yield Entry(model.embedding.word_embeddings.weight, "plain", ("model.embed_tokens.weight",))
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}."
        attention = layer.self_attention
        yield Entry(layer.input_layernorm.weight, "plain", (prefix + "input_layernorm.weight",))
        yield Entry(
            attention.linear_qkv.weight, "qkv", tuple(f"{prefix}self_attn.{part}_proj.weight" for part in "qkv")
        )
        if model.config.qk_layernorm:
            yield Entry(attention.q_layernorm.weight, "plain", (prefix + "self_attn.q_norm.weight",))
            yield Entry(attention.k_layernorm.weight, "plain", (prefix + "self_attn.k_norm.weight",))
        yield Entry(attention.linear_proj.weight, "plain", (prefix + "self_attn.o_proj.weight",))
        yield Entry(layer.pre_mlp_layernorm.weight, "plain", (prefix + "post_attention_layernorm.weight",))
        yield from feed_forward(layer.mlp, prefix + "mlp.")
    if model.post_process:
        yield Entry(model.decoder.final_layernorm.weight, "plain", ("model.norm.weight",))
        if not model.share_embeddings_and_output_weights:
            yield Entry(model.output_layer.weight, "plain", ("lm_head.weight",))


def dense_feed_forward(module: Any, prefix: str) -> Iterator[Entry]:
    """A SwiGLU block: megatron keeps gate and up in one matrix."""
    yield Entry(module.linear_fc1.weight, "gate_up", (prefix + "gate_proj.weight", prefix + "up_proj.weight"))
    yield Entry(module.linear_fc2.weight, "plain", (prefix + "down_proj.weight",))


def to_megatron(entry: Entry, tensors: list[torch.Tensor], query_groups: int, head_dim: int) -> torch.Tensor:
    """The value of entry.parameter, from the tensors named by entry.names."""
    if entry.kind == "gate_up":
        return torch.cat(tensors)
    if entry.kind == "qkv":
        # megatron: query group by query group its queries, its key, its value
        query, key, value = (tensor.reshape(query_groups, -1, head_dim, tensor.shape[-1]) for tensor in tensors)
        return torch.cat([query, key, value], 1).reshape(-1, tensors[0].shape[-1])
    return tensors[0]


def from_megatron(entry: Entry, value: torch.Tensor, query_groups: int, head_dim: int) -> list[torch.Tensor]:
    """The inverse of to_megatron, for a parameter or anything of its shape (a gradient); contiguous tensors."""
    if entry.kind == "gate_up":
        return list(value.chunk(2))
    if entry.kind == "qkv":
        grouped = value.reshape(query_groups, -1, head_dim, value.shape[-1])
        parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
        return [part.reshape(-1, value.shape[-1]) for part in parts]
    return [value]
