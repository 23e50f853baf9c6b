"""How a model and its optimizer lie over the trainer's ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from postroad.config.section import Section


class ParallelSection(Section):
    """trainer.processes is a multiple of tensor x pipeline x context; what is left over are data-parallel replicas."""

    tensor: int = Field(1, ge=1, description="Ranks that share each matrix (tensor parallel).")
    pipeline: int = Field(1, ge=1, description="Stages that share the layers (pipeline parallel).")
    virtual_pipeline: int = Field(1, ge=1, description="Model chunks of each stage (interleaved schedule).")
    context: int = Field(1, ge=1, description="Ranks that share each micro-batch's positions (context parallel).")
    expert: int = Field(1, ge=1, description="Ranks that share the experts; taken from data, context and tensor ranks.")
    expert_tensor: int = Field(1, ge=1, description="Ranks that share each expert.")
    sequence_parallel: bool = Field(False, description="Split norms and residuals over the tensor ranks.")
    distributed_optimizer: bool = Field(False, description="Split masters and moments over data and context ranks.")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="What the backward runs again: feed-forward blocks (selective) or whole layers (full)."
    )
    deterministic: bool = Field(
        True, description="On GPUs, equal inputs give equal bits. Without it a trainer that dies can't go on exactly."
    )

    def validate_world(self, processes: int) -> None:
        """Raises ValueError unless so many ranks can be laid out like this."""
        ranks = self.tensor * self.pipeline * self.context
        if processes % ranks:
            raise ValueError(
                f"trainer.processes {processes} can't be laid out as tensor {self.tensor} x pipeline {self.pipeline} x "
                f"context {self.context} of trainer.parallel: make it a multiple of {ranks}"
            )
        if (processes // self.pipeline) % (self.expert * self.expert_tensor):
            raise ValueError(
                f"the {processes // self.pipeline} ranks of a pipeline stage can't be laid out as expert {self.expert} x "
                f"expert_tensor {self.expert_tensor} of trainer.parallel"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("trainer.parallel.sequence_parallel splits over the tensor ranks: set tensor above 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("trainer.parallel.virtual_pipeline needs a pipeline of at least 2")
