"""What makes equal inputs give equal bits on a GPU; the CPU does so anyway."""

from __future__ import annotations

import os

import torch

from postroad_trainer.backend.settings import BackendError

# cuBLAS: NVIDIA cuBLAS documentation, "Results reproducibility". NCCL: one algorithm, whatever it would find faster.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_ALGO": ("Ring", "Tree")}


def make_deterministic() -> None:
    """Sets all that it needs, for the process. Raises BackendError for an environment that contradicts it."""
    for name, allowed in ENVIRONMENT.items():
        value = os.environ.setdefault(name, allowed[0])
        if value not in allowed:
            raise BackendError(
                f"{name} is {value!r}, which trainer.parallel.deterministic contradicts: unset it, or set it to "
                f"{' or '.join(allowed)}"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
