"""megatron's local layer spec with the norm and attention that need no Transformer Engine."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoESubmodules

from postroad_trainer.backend.attention import TreeAttention
from postroad_trainer.backend.experts import GroupedExperts
from postroad_trainer.backend.visibility import LayoutTable


class Norm(torch.nn.RMSNorm):
    """RMSNorm that knows sequence parallelism (megatron's WrappedTorchNorm refuses it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: Any, table: LayoutTable, chunk: int | None) -> Any:
    """megatron's local spec (dense, MoE or mixed layers) with the modules above."""

    def attention(*_: Any, **arguments: Any) -> TreeAttention:
        return TreeAttention(table, **arguments)

    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=chunk)
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        moe = getattr(layer.submodules.mlp, "keywords", {}).get("submodules")
        if isinstance(moe, MoESubmodules):
            moe.experts = partial(GroupedExperts, **moe.experts.keywords)
        parts = layer.submodules.self_attention.submodules
        parts.core_attention = attention
        if config.qk_layernorm:
            parts.q_layernorm = parts.k_layernorm = Norm
    spec.layer_norm = Norm
    return spec
