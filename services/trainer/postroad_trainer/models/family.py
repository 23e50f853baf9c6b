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
    """One megatron parameter and the Hugging Face tensors that it holds, or holds a part of.

    expert: it is split by expert tensor parallelism. rows: its vocabulary, without what was added to make it divide.
    copy: another pipeline stage has the same tensor; it is filled but not exported.
    """

    parameter: torch.nn.Parameter
    kind: Kind
    names: tuple[str, ...]
    expert: bool = False
    rows: int | None = None
    copy: bool = False


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
    rows = model.vocabulary
    if model.pre_process:
        yield Entry(model.embedding.word_embeddings.weight, "plain", ("model.embed_tokens.weight",), rows=rows)
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
            yield Entry(model.output_layer.weight, "plain", ("lm_head.weight",), rows=rows)
        elif not model.pre_process:
            yield Entry(model.output_layer.weight, "plain", ("model.embed_tokens.weight",), rows=rows, copy=True)


def dense_feed_forward(module: Any, prefix: str, expert: bool = False) -> Iterator[Entry]:
    """A SwiGLU block: megatron keeps gate and up in one matrix."""
    names = (prefix + "gate_proj.weight", prefix + "up_proj.weight")
    yield Entry(module.linear_fc1.weight, "gate_up", names, expert)
    yield Entry(module.linear_fc2.weight, "plain", (prefix + "down_proj.weight",), expert)


@dataclass(frozen=True)
class Piece:
    """[start, start + length) along `dim` of the Hugging Face tensor `name`, which is `full` long there."""

    name: str
    dim: int
    start: int
    length: int
    full: int


@dataclass(frozen=True)
class Mapping:
    """Between this rank's parameters and the pieces of Hugging Face tensors that they hold.

    tensor, expert_tensor: (index, number) of this rank among those that share dense and expert parameters.
    """

    query_groups: int
    head_dim: int
    tensor: tuple[int, int] = (0, 1)
    expert_tensor: tuple[int, int] = (0, 1)

    def pieces(self, entry: Entry) -> list[Piece]:
        """What the parts of `split` are pieces of, in their order."""
        index, ranks = self.expert_tensor if entry.expert else self.tensor
        parameter = entry.parameter
        if not getattr(parameter, "tensor_model_parallel", False):
            index, ranks = 0, 1
        dim = getattr(parameter, "partition_dim", 0) if ranks > 1 else 0
        found = []
        for name, part in zip(entry.names, self._split(entry, parameter.detach()), strict=True):
            held = part.shape[dim]
            full = held * ranks if entry.rows is None else entry.rows
            found.append(Piece(name, dim, index * held, max(0, min(held, full - index * held)), full))
        return found

    def split(self, entry: Entry, value: torch.Tensor) -> list[torch.Tensor]:
        """A parameter, or anything of its shape (a gradient), as the pieces of its tensors; contiguous."""
        parts = self._split(entry, value)
        pieces = self.pieces(entry)
        return [part.narrow(p.dim, 0, p.length).contiguous() for part, p in zip(parts, pieces, strict=True)]

    def _split(self, entry: Entry, value: torch.Tensor) -> list[torch.Tensor]:
        if entry.kind == "gate_up":
            return list(value.chunk(2))
        if entry.kind == "qkv":
            # megatron: query group by query group its queries, its key, its value
            grouped = value.reshape(self.query_groups // self.tensor[1], -1, self.head_dim, value.shape[-1])
            parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
            return [part.reshape(-1, value.shape[-1]) for part in parts]
        return [value]

    def join(self, entry: Entry, parts: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`; rows beyond the vocabulary are 0."""
        if entry.kind == "gate_up":
            return torch.cat(parts)
        if entry.kind == "qkv":
            groups = self.query_groups // self.tensor[1]
            whole = torch.cat([part.reshape(groups, -1, self.head_dim, part.shape[-1]) for part in parts], 1)
            return whole.reshape(-1, parts[0].shape[-1])
        missing = len(entry.parameter) - len(parts[0]) if entry.rows is not None else 0
        return torch.cat([parts[0], parts[0].new_zeros(missing, parts[0].shape[-1])]) if missing else parts[0]
