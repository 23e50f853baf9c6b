"""Facts of the served model, read from its folder without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postroad_router.families import FAMILIES, family_of

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


class ModelFolderError(ValueError):
    """The model's folder lacks what the router needs; the message names the file."""


@dataclass(frozen=True)
class ModelFacts:
    """`end_ids` end a generation. `experts` is 0 for dense models."""

    vocabulary: int
    end_ids: frozenset[int]
    experts: int = 0
    experts_per_token: int = 1
    moe_layers: tuple[int, ...] = ()
    layers: int = 0
    family: str = "default"


def read_model(folder: Path) -> ModelFacts:
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    generation = folder / "generation_config.json"
    end = read_json(generation).get("eos_token_id") if generation.exists() else None
    end = text.get("eos_token_id") if end is None else end
    end_ids = frozenset(end if isinstance(end, list) else [] if end is None else [end])
    experts = next((int(text[key]) for key in EXPERTS if text.get(key)), 0)
    if "vocab_size" not in text:
        raise ModelFolderError(f"{folder / 'config.json'} has no vocab_size")
    family = next(
        (f for kind in (config, text) if (f := family_of(str(kind.get("model_type")))).models), FAMILIES["default"]
    )
    if not experts:
        return ModelFacts(int(text["vocab_size"]), end_ids, family=family.name)
    per_token = next((int(text[key]) for key in PER_TOKEN if text.get(key)), 1)
    layers = int(text["num_hidden_layers"])
    return ModelFacts(int(text["vocab_size"]), end_ids, experts, per_token, _moe_layers(text), layers, family.name)


def _moe_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Of Qwen's and DeepSeek's spellings; all layers where neither is used."""
    dense = set(config.get("mlp_only_layers") or ()) | set(range(config.get("first_k_dense_replace") or 0))
    step = config.get("decoder_sparse_step") or config.get("moe_layer_freq") or 1
    step = step if isinstance(step, int) else 1
    offset = 1 if config.get("decoder_sparse_step") else 0
    layers = range(int(config["num_hidden_layers"]))
    return tuple(layer for layer in layers if layer not in dense and (layer + offset) % step == 0)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} can't be read: {error}; POSTROAD_MODEL must name a model folder") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object")
    return value
