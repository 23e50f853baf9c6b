"""Process groups: torch.distributed and megatron's parallel state."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from postroad_trainer.backend.determinism import make_deterministic
from postroad_trainer.backend.settings import BackendError, BackendSettings


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialise(settings: BackendSettings) -> None:
    """Joins the world of RANK and WORLD_SIZE (world 1 without them) and makes megatron's groups.

    A process has the groups of one layout at a time: `dissolve` comes before another.
    """
    from megatron.core import parallel_state, tensor_parallel

    if settings.parallel.deterministic and torch.cuda.is_available():
        make_deterministic()
    if not dist.is_initialized():
        _join(timedelta(seconds=settings.collective_timeout_s))
    parallel = settings.parallel
    try:
        parallel.validate_world(dist.get_world_size())
    except ValueError as error:
        raise BackendError(str(error)) from error
    if min(parallel.expert, parallel.expert_tensor) > 1 and not torch.cuda.is_available():
        raise BackendError(
            "trainer.parallel.expert with expert_tensor needs GPUs: gloo can't gather parts of unequal size"
        )
    wanted = (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert, parallel.expert_tensor)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            create_gloo_process_groups=False,
        )
    built = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    if built != wanted:
        raise BackendError(
            f"this process already has groups of (tensor, pipeline, context, expert, expert_tensor) {built}; "
            f"{wanted} was asked for. Start a new process for another layout"
        )
    tensor_parallel.model_parallel_cuda_manual_seed(settings.seed)


def dissolve() -> None:
    """Leaves the world: a backend of another layout can then be built in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _share_network_thread() -> None:
    """gloo's groups listen in one thread of the process, instead of a thread each: idle, those of a layout's two dozen
    groups take 3 % of a core. torch has no option for it, so the class that it makes groups of is replaced."""
    plain = distributed_c10d.ProcessGroupGloo
    if plain.__module__ == __name__:
        return
    device = plain.create_default_device()

    class SharingGroup(plain):  # type: ignore[misc, valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = plain._Options()
            options._devices, options._threads, options._timeout = [device], 1, timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharingGroup  # type: ignore[misc]


def _join(timeout: timedelta) -> None:
    _share_network_thread()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world_size() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


class Ranks:
    """This rank's place in every group, and the reductions that the backend needs."""

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.tensor = state.get_tensor_model_parallel_group()
        self.context = state.get_context_parallel_group()
        self.pipeline = state.get_pipeline_model_parallel_group()
        self.data = state.get_data_parallel_group()
        self.replicas = state.get_data_parallel_group(with_context_parallel=True)
        self.expert_tensor = state.get_expert_tensor_parallel_group()
        self.expert_replicas = state.get_expert_data_parallel_group()

    def over_batch(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """values of the last pipeline stage, 0 on the others, combined over the data ranks and told to every stage."""
        for group in (self.data, self.pipeline):
            if group.size() > 1:
                dist.all_reduce(values, operation, group=group)
        return values

    def over_world(self, values: torch.Tensor) -> torch.Tensor:
        """values summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: int) -> int:
        """The largest value of any rank."""
        return max(int(told) for told in self.tell_all(str(int(value)).encode()))

    def tell_all(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, on every rank."""
        if self.world == 1:
            return [data]
        device = torch.cuda.current_device()
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=device))
        longest = int(max(sizes))
        padded = torch.frombuffer(bytearray(data.ljust(longest, b" ")), dtype=torch.uint8).to(device)
        buffers = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(buffers, padded)
        return [buffer[: int(size)].cpu().numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
