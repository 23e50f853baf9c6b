"""Process groups: torch.distributed and megatron's parallel state, made once per process."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from postroad_trainer.backend.settings import BackendError, BackendSettings


def initialise(settings: BackendSettings) -> None:
    """Joins the world that torchrun's environment describes (world 1 without it) and makes megatron's groups.

    A process keeps its groups for life; asking for other sizes later raises BackendError.
    """
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        _join(timedelta(seconds=settings.collective_timeout_s))
    sizes = (settings.tensor_parallel, settings.pipeline_parallel, settings.context_parallel)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            settings.tensor_parallel,
            settings.pipeline_parallel,
            context_parallel_size=settings.context_parallel,
            expert_model_parallel_size=settings.expert_parallel,
            expert_tensor_parallel_size=settings.tensor_parallel,
        )
    built = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if built != sizes:
        raise BackendError(
            f"this process already has groups of (tensor, pipeline, context) {built}; {sizes} was asked "
            "for. Start a new process for another layout"
        )
    tensor_parallel.model_parallel_cuda_manual_seed(settings.seed)


def _join(timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


class DataParallel:
    """This rank's place among the data-parallel replicas."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.size: int = self.group.size()
        self.rank: int = self.group.rank()

    def reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """values, combined over the replicas, in place."""
        if self.size > 1:
            dist.all_reduce(values, operation, group=self.group)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)
