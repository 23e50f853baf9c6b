"""Qwen3, dense: Llama with a norm on queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from postroad_trainer.models.configuration import ModelConfiguration
from postroad_trainer.models.family import Entry, Family, decoder_entries, dense_arguments, dense_feed_forward


def qwen3_arguments(configuration: ModelConfiguration) -> dict[str, Any]:
    configuration.require("use_sliding_window", False, False)
    return {**dense_arguments(configuration), "qk_layernorm": True}


def _entries(model: Any) -> Iterator[Entry]:
    return decoder_entries(model, dense_feed_forward)


QWEN3 = Family("Qwen3ForCausalLM", qwen3_arguments, _entries)
