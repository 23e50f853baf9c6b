"""The training backend: megatron-core behind five verbs. megatron itself is imported when a backend is built.

settings         what a backend is built from
cpu_shim         megatron-core on a machine without CUDA
parallel         process groups
determinism      equal inputs, equal bits on a GPU
construction     model chunks, DDP wrappers and optimizer
spec             norm and attention without Transformer Engine, in megatron's layers
attention        attention over trees with a shared prompt
experts          experts by grouped matrix products
compiled         element-wise work in one kernel on a GPU
layout           rows to trees with shared prompts to micro-batches (numpy only)
visibility       who sees whom in a micro-batch, as tensors; stripes of context ranks
routing          rows without recorded experts beside rows with them (numpy only)
replay           the experts recorded at inference, replayed in forward and recompute
recording        the experts that a pass chose, by row
runner           micro-batches through megatron's schedules
head             log-probabilities from hidden states on tensor and context ranks
log_probabilities  log-softmax at the predicted tokens, with its own backward
objective        loss and agreement metrics of a micro-batch
gather           whole tensors from the ranks that hold their pieces
state            parameters, masters and moments by Hugging Face name
checkpoint       exact save and load
megatron         MegatronBackend, which ties them together
"""

from postroad_trainer.backend.cpu_shim import enter_thread
from postroad_trainer.backend.megatron import MegatronBackend
from postroad_trainer.backend.settings import BackendError, BackendSettings

__all__ = ["BackendError", "BackendSettings", "MegatronBackend", "enter_thread"]
