"""A model folder's config.json, read directly: no transformers, no network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A model folder that can't be used; the message names the file, the value and the remedy."""


@dataclass(frozen=True)
class ModelConfiguration:
    """config.json of a Hugging Face model folder."""

    path: Path
    values: dict[str, Any]

    @property
    def architectures(self) -> list[str]:
        return list(self.values.get("architectures") or [])

    @property
    def tied(self) -> bool:
        return bool(self.values.get("tie_word_embeddings", False))

    @property
    def head_dim(self) -> int:
        return int(self.values.get("head_dim") or self.integer("hidden_size") // self.integer("num_attention_heads"))

    @property
    def rope_theta(self) -> float:
        """The rotary base. transformers 5 writes it in rope_parameters, earlier ones at the top level."""
        parameters = self.values.get("rope_parameters") or {}
        theta = parameters.get("rope_theta", self.values.get("rope_theta"))
        if theta is None:
            raise ModelError(f"{self.path}: neither rope_theta nor rope_parameters.rope_theta is set")
        scaling = self.values.get("rope_scaling") or {}
        kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
        if kind != "default":
            raise ModelError(f"{self.path}: rope type {kind!r} is not supported; only 'default' is")
        return float(theta)

    def integer(self, key: str) -> int:
        """A required whole number of at least 1."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.path}: {key} is {value!r}; a whole number of at least 1 is needed")
        return value

    def require(self, key: str, wanted: Any, default: Any) -> None:
        """Raises ModelError unless the key (or its default) has the only value that the family supports."""
        value = self.values.get(key, default)
        if value != wanted:
            raise ModelError(f"{self.path}: {key} is {value!r}; the trainer supports only {wanted!r} here")


def read_configuration(model_path: Path) -> ModelConfiguration:
    """Reads model_path/config.json. Raises ModelError when it is missing or no JSON object."""
    path = model_path / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist; model_path must be a Hugging Face model folder")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}; a JSON object is expected")
    return ModelConfiguration(path, values)
