"""What a backend is built from. Plain data: no torch, no megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class BackendError(RuntimeError):
    """The backend can't do what it was asked; the message says why and what to change."""


@dataclass(frozen=True)
class BackendSettings:
    """One training backend. World size and rank come from torchrun's environment; without it the world is 1.

    micro_batch_tokens: most positions in one forward and backward; it is also the longest row.
    tree_tokens: most positions that attend within one tree (a shared prompt and its responses). Attention costs the
    square of this, so a group of long responses is cut into several trees that each repeat the prompt.
    share_prompts: lay rows of a group out behind one copy of their prompt.
    freeze_embedding: the embedding (and a tied output head) is not trained and has no optimizer state.
    """

    model_path: Path
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    overlap_p2p: bool = False
    context_parallel: int = 1
    expert_parallel: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    freeze_embedding: bool = False
    recompute: bool = False
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
        if self.pipeline_parallel == 2 and self.virtual_pipeline_parallel > 1 and not self.overlap_p2p:
            # Silently wrong activations and gradients otherwise: feasibility/megatron.md, "Traps met".
            raise BackendError(
                "2 pipeline stages with virtual stages need overlap_p2p; without it megatron mixes up "
                "the stages' tensors"
            )
        sizes = {
            name: getattr(self, name)
            for name in (
                "tensor_parallel",
                "pipeline_parallel",
                "virtual_pipeline_parallel",
                "context_parallel",
                "expert_parallel",
            )
        }
        wrong = {name: size for name, size in sizes.items() if size != 1}
        if wrong:
            raise BackendError(f"{wrong}: this backend runs data parallel only; set these sizes to 1")
