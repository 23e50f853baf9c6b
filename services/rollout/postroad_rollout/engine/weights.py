"""Model configuration and parameters: a Hugging Face folder in, fused tensors out.

q, k, v and gate, up are stored fused, experts stacked. `Weights.views` maps every Hugging Face name to its view into
the fused storage, so that loading, staging and exporting are plain copies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import TensorError, UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModelConfig:
    """The parts of config.json that the forward pass depends on."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    experts: int
    top_k: int
    expert_size: int
    normalise_top_k: bool
    moe_layers: tuple[int, ...]
    eos_token_ids: frozenset[int]

    @property
    def qk_norm(self) -> bool:
        return self.architecture.startswith("Qwen3")

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read config.json (and generation_config.json for the stop tokens); refuse what the forward lacks."""
        if not (folder / "config.json").is_file():
            raise UnsupportedModelError(f"{folder} has no config.json; give a Hugging Face model folder.")
        c: dict[str, Any] = json.loads((folder / "config.json").read_text())
        architecture = (c.get("architectures") or ["(none)"])[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{folder} is a {architecture}; the embedded engine serves {', '.join(ARCHITECTURES)}. Use SGLang."
            )
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        refused = {
            "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
            "hidden_act": c.get("hidden_act", "silu") != "silu",
            "attention_bias": c.get("attention_bias", False),
            "mlp_bias": c.get("mlp_bias", False),
            "use_sliding_window": c.get("use_sliding_window", False),
        }
        if any(refused.values()):
            names = ", ".join(name for name, bad in refused.items() if bad)
            raise UnsupportedModelError(f"{folder}/config.json sets {names} in a way only SGLang serves.")
        generation = folder / "generation_config.json"
        eos = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        eos = c.get("eos_token_id") if eos is None else eos
        layers, experts = c["num_hidden_layers"], c.get("num_experts", c.get("num_local_experts", 0)) or 0
        moe = architecture == "Qwen3MoeForCausalLM"
        dense, every = set(c.get("mlp_only_layers") or ()), c.get("decoder_sparse_step", 1)
        return cls(
            architecture=architecture,
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            layers=layers,
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads", c["num_attention_heads"]),
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
            max_positions=c.get("max_position_embeddings", 2048),
            tied=c.get("tie_word_embeddings", False),
            experts=experts if moe else 0,
            top_k=c.get("num_experts_per_tok", 0) if moe else 0,
            expert_size=c.get("moe_intermediate_size", 0) if moe else 0,
            normalise_top_k=c.get("norm_topk_prob", False),
            moe_layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0) if moe else (),
            eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
        )


class Layer:
    """Fused tensors of one decoder layer; `gate_up` and `down` have a leading expert axis when `router` is set."""

    def __init__(self, config: ModelConfig, index: int, **kind: Any) -> None:
        c, d = config, config.hidden_size
        self.norm1, self.norm2 = torch.empty(d, **kind), torch.empty(d, **kind)
        self.qkv = torch.empty((c.heads + 2 * c.kv_heads) * c.head_dim, d, **kind)
        self.out = torch.empty(d, c.heads * c.head_dim, **kind)
        self.q_norm = torch.empty(c.head_dim, **kind) if c.qk_norm else None
        self.k_norm = torch.empty(c.head_dim, **kind) if c.qk_norm else None
        moe = index in c.moe_layers
        size, lead = (c.expert_size, (c.experts,)) if moe else (c.intermediate_size, ())
        self.router = torch.empty(c.experts, d, **kind) if moe else None
        self.gate_up = torch.empty(*lead, 2 * size, d, **kind)
        self.down = torch.empty(*lead, d, size, **kind)

    def views(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        c = config
        heads = torch.split(self.qkv, [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim])
        yield from zip((f"self_attn.{n}_proj" for n in "qkv"), heads, strict=True)
        yield from (("self_attn.o_proj", self.out), ("input_layernorm", self.norm1))
        yield "post_attention_layernorm", self.norm2
        if self.q_norm is not None and self.k_norm is not None:
            yield from (("self_attn.q_norm", self.q_norm), ("self_attn.k_norm", self.k_norm))
        if self.router is not None:
            yield "mlp.gate", self.router
        experts = range(c.experts) if self.router is not None else (None,)
        for e in experts:
            gate_up, down = (self.gate_up, self.down) if e is None else (self.gate_up[e], self.down[e])
            prefix = "mlp" if e is None else f"mlp.experts.{e}"
            gate, up = gate_up.chunk(2)
            yield from ((f"{prefix}.gate_proj", gate), (f"{prefix}.up_proj", up), (f"{prefix}.down_proj", down))


class Weights:
    """One full set of parameters; `views` gives each by its Hugging Face name."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: str) -> None:
        kind = {"dtype": dtype, "device": device}
        self.config, self.dtype = config, dtype
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, **kind)
        self.head = self.embedding if config.tied else torch.empty_like(self.embedding)
        self.norm = torch.empty(config.hidden_size, **kind)
        self.layers = [Layer(config, i, **kind) for i in range(config.layers)]
        self.views: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        if not config.tied:
            self.views["lm_head.weight"] = self.head
        for i, layer in enumerate(self.layers):
            self.views |= {f"model.layers.{i}.{name}.weight": view for name, view in layer.views(config)}

    def copy_in(self, named_tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors in by name and return the names; raises TensorError on the first that doesn't fit."""
        copied: set[str] = set()
        for name, tensor in named_tensors:
            view = self.views.get(name)
            if view is None and not (name == "lm_head.weight" and self.config.tied):  # a tied head is the embedding
                raise TensorError(f"{name} is not a tensor of this {self.config.architecture}.")
            expected = self.embedding if view is None else view
            if tensor.shape != expected.shape:
                raise TensorError(f"{name} has shape {list(tensor.shape)}; this model has {list(expected.shape)}.")
            if tensor.dtype not in FLOATS:
                raise TensorError(f"{name} has dtype {tensor.dtype}; send float32, bfloat16 or float16.")
            if view is not None:
                view.copy_(tensor)
                copied.add(name)
        return copied

    @classmethod
    def load(cls, folder: Path, config: ModelConfig, dtype: torch.dtype, device: str) -> Weights:
        """Read all tensors of a folder; raises TensorError naming what is missing."""
        weights = cls(config, dtype, device)
        missing = weights.views.keys() - weights.copy_in(read_folder(folder))
        if missing:
            raise TensorError(f"{folder} lacks {len(missing)} tensors, e.g. {min(missing)}; convert the model again.")
        return weights


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of model.safetensors, or of the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise TensorError(f"{file} does not exist; a model folder needs model.safetensors or all of its shards.")
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                yield name, shard.get_tensor(name)
