"""What a backend is built from. Plain data: no torch, no megatron."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class BackendError(RuntimeError):
    """The backend can't do what it was asked; the message says why and what to change."""


@dataclass(frozen=True)
class ParallelSettings:
    """How a model and its optimizer lie over the ranks. The world is tensor x pipeline x context x data ranks.

    virtual_pipeline: model chunks of each pipeline stage. expert: ranks that share the experts; they are taken from
    the data, context and tensor ranks. expert_tensor: ranks that share one expert.
    sequence_parallel: norms and residuals are split over the tensor ranks along the sequence.
    distributed_optimizer: master weights and moments are split over the data and context ranks.
    recompute: "selective" runs feed-forward blocks again in the backward, "full" whole layers.
    optimizer_offload: masters and moments stay in host memory. deterministic: equal inputs give equal bits on a GPU.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    optimizer_offload: bool = False
    deterministic: bool = False

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tensor * self.pipeline * self.context

    def validate_world(self, world_size: int) -> None:
        """Raises BackendError when the sizes do not divide the world."""
        if world_size % self.model_ranks:
            raise BackendError(
                f"{world_size} trainer processes can't be split into tensor {self.tensor} x pipeline {self.pipeline} "
                f"x context {self.context}; make processes a multiple of {self.model_ranks}"
            )
        if (world_size // self.pipeline) % (self.expert * self.expert_tensor):
            raise BackendError(
                f"the {world_size // self.pipeline} ranks of a pipeline stage can't be split into expert "
                f"{self.expert} x expert_tensor {self.expert_tensor}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise BackendError("sequence_parallel needs tensor of at least 2: it splits over the tensor ranks")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise BackendError("virtual_pipeline needs pipeline of at least 2")

    def validate_model(self, arguments: dict[str, object]) -> None:
        """Raises BackendError unless the sizes divide a model of these TransformerConfig arguments."""
        experts = arguments.get("num_moe_experts")
        divided = [
            ("num_query_groups", self.tensor, "tensor"),
            ("num_attention_heads", self.tensor, "tensor"),
            ("ffn_hidden_size", self.tensor, "tensor"),
            ("num_layers", self.pipeline * self.virtual_pipeline, "pipeline x virtual_pipeline"),
            ("num_moe_experts", self.expert, "expert"),
            ("moe_ffn_hidden_size", self.expert_tensor, "expert_tensor"),
        ]
        for key, size, name in divided:
            if (value := int(arguments.get(key) or 0)) % size:  # type: ignore[call-overload]
                raise BackendError(f"the model's {key} {value} is not a multiple of trainer.parallel.{name} {size}")
        if not experts and self.expert * self.expert_tensor > 1:
            raise BackendError("the model has no experts; set trainer.parallel.expert and expert_tensor to 1")
        if experts and self.tensor > 1 and not self.sequence_parallel:
            raise BackendError("experts with tensor ranks need trainer.parallel.sequence_parallel: true")


@dataclass(frozen=True)
class BackendSettings:
    """One training backend. World size and rank come from RANK and WORLD_SIZE; without them the world is 1.

    micro_batch_tokens: most positions in one forward and backward; it is also the longest row.
    tree_tokens: most positions that attend within one tree (a shared prompt and its responses). Attention costs the
    square of this, so a group of long responses is cut into several trees that each repeat the prompt.
    share_prompts: lay rows of a group out behind one copy of their prompt.
    freeze_embedding: the embedding (and a tied output head) is not trained and has no optimizer state.
    """

    model_path: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: int = 1
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    freeze_embedding: bool = False
    share_prompts: bool = True
    micro_batch_tokens: int = 2048
    tree_tokens: int = 512
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
