"""What a backend is built from. Plain data: no torch, no megatron."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from postroad.config.parallel import ParallelSection


class BackendError(RuntimeError):
    """The backend can't do what it was asked; the message says why and what to change."""


def validate_model(parallel: ParallelSection, arguments: dict[str, Any]) -> None:
    """Raises BackendError unless the sizes divide a model of these TransformerConfig arguments."""
    experts = arguments.get("num_moe_experts")
    divided = [
        ("num_query_groups", parallel.tensor, "tensor"),
        ("num_attention_heads", parallel.tensor, "tensor"),
        ("ffn_hidden_size", parallel.tensor, "tensor"),
        ("num_layers", parallel.pipeline * parallel.virtual_pipeline, "pipeline x virtual_pipeline"),
        ("num_moe_experts", parallel.expert, "expert"),
        ("moe_ffn_hidden_size", parallel.expert_tensor, "expert_tensor"),
    ]
    for key, size, name in divided:
        if (value := int(arguments.get(key) or 0)) % size:
            raise BackendError(f"the model's {key} {value} is not a multiple of trainer.parallel.{name} {size}")
    if not experts and parallel.expert * parallel.expert_tensor > 1:
        raise BackendError("the model has no experts; set trainer.parallel.expert and expert_tensor to 1")
    if experts and parallel.tensor > 1 and not parallel.sequence_parallel:
        raise BackendError("experts with tensor ranks need trainer.parallel.sequence_parallel: true")


@dataclass(frozen=True)
class BackendSettings:
    """One training backend. World size and rank come from RANK and WORLD_SIZE; without them the world is 1.

    micro_batch_tokens: most positions in one forward and backward; it is also the longest row.
    tree_tokens: most positions that attend within one tree (a shared prompt and its responses). Attention costs the
    square of this, so a group of long responses is cut into several trees that each repeat the prompt.
    share_prompts: lay rows of a group out behind one copy of their prompt.
    freeze_embedding: the embedding (and a tied output head) is not trained and has no optimizer state.
    unknown_experts: what becomes of tokens without recorded experts in a step that replays others (recipe reference).
    """

    model_path: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: int = 1
    parallel: ParallelSection = field(default_factory=ParallelSection)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    freeze_embedding: bool = False
    share_prompts: bool = True
    micro_batch_tokens: int = 2048
    tree_tokens: int = 512
    unknown_experts: Literal["record", "mask"] = "record"
    collective_timeout_s: float = 600.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float32"):
            raise BackendError(f"dtype is {self.dtype!r}; bfloat16 or float32 expected")
        if min(self.threads, self.micro_batch_tokens, self.tree_tokens) < 1:
            raise BackendError(
                f"threads {self.threads}, micro_batch_tokens {self.micro_batch_tokens} and tree_tokens "
                f"{self.tree_tokens} must each be at least 1"
            )
