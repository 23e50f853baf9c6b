"""Llama and SmolLM2 (tied embeddings)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from postroad_trainer.models.configuration import ModelConfiguration
from postroad_trainer.models.family import Entry, Family, decoder_entries, dense_arguments, dense_feed_forward


def _arguments(configuration: ModelConfiguration) -> dict[str, Any]:
    configuration.require("mlp_bias", False, False)
    return {**dense_arguments(configuration), "qk_layernorm": False}


def _entries(model: Any) -> Iterator[Entry]:
    return decoder_entries(model, dense_feed_forward)


LLAMA = Family("LlamaForCausalLM", _arguments, _entries)
