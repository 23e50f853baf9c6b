"""The tensors of a model, from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """split: the dimension that tensor parallelism cuts, None for a copy on every rank. layer: None outside of layers."""

    name: str
    shape: tuple[int, ...]
    split: int | None
    layer: int | None = None
    expert: int | None = None
    first: bool = True  # outside of layers: on the first stage, else on the last


def tensors_of(model: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of a Llama, Qwen3 or Qwen3-MoE of this config.json, in Hugging Face's names."""
    hidden, head, vocabulary = model["hidden_size"], model["head_dim"], model["vocab_size"]
    query, value = model["num_attention_heads"] * head, model["num_key_value_heads"] * head
    yield Tensor("model.embed_tokens.weight", (vocabulary, hidden), 0)
    for layer in range(model["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(f"{prefix}{name}.weight", (hidden,), None, layer)
        for name, shape, split in (("q", (query, hidden), 0), ("k", (value, hidden), 0), ("v", (value, hidden), 0),
                                   ("o", (hidden, query), 1)):  # fmt: skip
            yield Tensor(f"{prefix}self_attn.{name}_proj.weight", shape, split, layer)
        if model["model_type"].startswith("qwen3"):
            for name in ("q_norm", "k_norm"):
                yield Tensor(f"{prefix}self_attn.{name}.weight", (head,), None, layer)
        experts = None if layer in model.get("mlp_only_layers", ()) else model.get("num_experts")
        if experts:
            yield Tensor(f"{prefix}mlp.gate.weight", (experts, hidden), None, layer)
        width = model["moe_intermediate_size"] if experts else model["intermediate_size"]
        for expert in range(experts) if experts else (None,):
            block = f"{prefix}mlp." if expert is None else f"{prefix}mlp.experts.{expert}."
            for name, shape, split in (
                ("gate", (width, hidden), 0),
                ("up", (width, hidden), 0),
                ("down", (hidden, width), 1),
            ):
                yield Tensor(f"{block}{name}_proj.weight", shape, split, layer, expert)
    yield Tensor("model.norm.weight", (hidden,), None, first=False)
    if not model["tie_word_embeddings"]:
        yield Tensor("lm_head.weight", (vocabulary, hidden), 0, first=False)
