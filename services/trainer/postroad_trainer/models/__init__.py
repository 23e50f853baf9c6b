"""Model families: a Hugging Face config.json to megatron's configuration, and the weights both ways.

One file per family; `family_of` finds it by the `architectures` entry of config.json. Nothing here imports
megatron: a family names the arguments of TransformerConfig, and walks a built model by its attributes.
"""

from __future__ import annotations

from postroad_trainer.models.configuration import ModelConfiguration, ModelError, read_configuration
from postroad_trainer.models.family import Family
from postroad_trainer.models.llama import LLAMA
from postroad_trainer.models.qwen3 import QWEN3
from postroad_trainer.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {family.architecture: family for family in (LLAMA, QWEN3, QWEN3_MOE)}


def family_of(configuration: ModelConfiguration) -> Family:
    """The family of a model folder's configuration. Raises ModelError for an architecture that is not known."""
    for architecture in configuration.architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise ModelError(
        f"{configuration.path}: architecture {', '.join(configuration.architectures) or '(none)'} is not "
        f"known to the trainer; it knows {', '.join(sorted(FAMILIES))}"
    )


__all__ = ["FAMILIES", "Family", "ModelConfiguration", "ModelError", "family_of", "read_configuration"]
