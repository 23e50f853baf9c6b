"""A version on the GPU, in the form that SGLang takes: one buffer of bytes, and where each tensor lies in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 256  # of each tensor in the buffer, so that kernels may read it as any dtype


@dataclass(frozen=True)
class Place:
    """Bytes [start, end) of the buffer are the tensor `name`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True)
class StagedWeights:
    """buffer: uint8 [bytes] on the device. It must live until the server has answered."""

    buffer: torch.Tensor
    places: list[Place]

    @staticmethod
    def copy_of(
        named_tensors: Iterable[tuple[str, torch.Tensor]], device: str, previous: StagedWeights | None = None
    ) -> StagedWeights:
        """A copy of the tensors on `device`, in the previous buffer where that is large enough."""
        tensors = list(named_tensors)
        places, end = [], 0
        for name, tensor in tensors:
            start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            end = start + tensor.numel() * tensor.element_size()
            places.append(Place(name, tuple(tensor.shape), tensor.dtype, start, end))
        buffer = previous.buffer if previous is not None and previous.buffer.numel() >= end else None
        if buffer is None:
            buffer = torch.empty(end, dtype=torch.uint8, device=device)
        for (_, tensor), place in zip(tensors, places, strict=True):
            buffer[place.start : place.end].copy_(tensor.contiguous().reshape(-1).view(torch.uint8), non_blocking=True)
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)
        return StagedWeights(buffer, places)


def serialize(staged: StagedWeights) -> str:
    """The body of update_weights_from_tensor: SGLang's pickle of a CUDA IPC handle and the places. It holds no weights,
    and goes over loopback to a server that asks for the mesh's key; SGLang unpickles an allow-list of classes only."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    monkey_patch_torch_reductions()  # name the device by its UUID: the two processes may number devices differently
    metadata = [
        FlattenedTensorMetadata(place.name, torch.Size(place.shape), place.dtype, place.start, place.end,
                                place.end - place.start)
        for place in staged.places
    ]  # fmt: skip
    handle = {"flattened_tensor": staged.buffer, "metadata": metadata}
    return str(MultiprocessingSerializer.serialize(handle, output_str=True))
