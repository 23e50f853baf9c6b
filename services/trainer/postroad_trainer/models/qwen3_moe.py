"""Qwen3-MoE: every layer a mixture of experts, or dense where mlp_only_layers / decoder_sparse_step say so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from postroad_trainer.models.configuration import ModelConfiguration
from postroad_trainer.models.family import Entry, Family, decoder_entries, dense_feed_forward
from postroad_trainer.models.qwen3 import qwen3_arguments


def _arguments(configuration: ModelConfiguration) -> dict[str, Any]:
    # megatron's softmax over the chosen logits equals the softmax over all, renormalised: norm_topk_prob
    configuration.require("norm_topk_prob", True, False)
    layers = configuration.integer("num_hidden_layers")
    dense = set(configuration.values.get("mlp_only_layers") or [])
    step = int(configuration.values.get("decoder_sparse_step") or 1)
    return {
        **qwen3_arguments(configuration),
        "num_moe_experts": configuration.integer("num_experts"),
        "moe_router_topk": configuration.integer("num_experts_per_tok"),
        "moe_ffn_hidden_size": configuration.integer("moe_intermediate_size"),
        "moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)],
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_enable_routing_replay": True,
    }


def _feed_forward(module: Any, prefix: str) -> Iterator[Entry]:
    if not hasattr(module, "router"):
        yield from dense_feed_forward(module, prefix)
        return
    yield Entry(module.router.weight, "plain", (prefix + "gate.weight",))
    for expert, number in zip(module.experts.local_experts, module.local_expert_indices, strict=True):
        yield from dense_feed_forward(expert, f"{prefix}experts.{number}.", expert=True)


def _entries(model: Any) -> Iterator[Entry]:
    return decoder_entries(model, _feed_forward)


QWEN3_MOE = Family("Qwen3MoeForCausalLM", _arguments, _entries)
