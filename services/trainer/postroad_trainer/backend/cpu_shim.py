"""megatron-core 0.19.2 on a machine without CUDA, over gloo.

One TorchFunctionMode rewrites device="cuda" and .cuda() to the CPU, instead of patching megatron's call sites.
`import_megatron()` must run before anything imports megatron.core; on a machine without CUDA it also replaces
torch.compile and parts of torch.cuda for the whole process, so it is called in trainer processes only.
The mode is per thread: `cpu_mode()` enters it in the calling thread for as long as the block runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from postroad_trainer.backend.settings import BackendError

MEGATRON_VERSION = "0.19.2"
INSTALL = f"pip install --no-deps --ignore-requires-python megatron-core=={MEGATRON_VERSION}"
CPU = torch.device("cpu")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return CPU
    return value


class _CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)  # megatron's optimizer switches on this string
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(value) for value in args)
        if not kwargs:
            return func(*args)
        kwargs = dict(kwargs)
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Null:
    """Stands for a Stream or an Event: whatever it is asked, it answers itself."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


class _TritonStub(types.ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "3.6.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda function=None, *_, **__: function if callable(function) else (lambda decorated: decorated)


@contextlib.contextmanager
def _triton_importable() -> Iterator[None]:
    """megatron imports triton unconditionally; the CPU wheel of torch brings none."""
    if importlib.util.find_spec("triton"):
        yield
        return
    stubs = {name: _TritonStub(name) for name in ("triton", "triton.language")}
    stubs["triton"].language = stubs["triton.language"]  # type: ignore[attr-defined]
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


def _replace_cuda() -> None:
    cuda, null = torch.cuda, _Null()

    def answer(value: Any) -> Any:
        return lambda *_, **__: value

    replacements = {
        "current_device": answer(CPU),
        "set_device": answer(None),
        "synchronize": answer(None),
        "empty_cache": answer(None),
        "Stream": _Null,
        "Event": _Null,
        "current_stream": answer(null),
        "default_stream": answer(null),
        "stream": answer(contextlib.nullcontext()),
        "device_count": answer(1),
        "get_device_capability": answer((0, 0)),
        "is_current_stream_capturing": answer(False),
        "get_device_properties": answer(types.SimpleNamespace(multi_processor_count=1, major=0, minor=0)),
        "memory_allocated": answer(0),
        "max_memory_allocated": answer(0),
        "memory_reserved": answer(0),
        # On the CPU the "CUDA" generator is the default generator.
        "get_rng_state": lambda *_, **__: torch.random.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.random.set_rng_state(state),
        "manual_seed": torch.random.default_generator.manual_seed,
        "manual_seed_all": torch.random.default_generator.manual_seed,
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = answer(None)
    torch.compile = lambda model=None, *_, **__: model if model is not None else (lambda function: function)


def _repair_megatron() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    random._get_cuda_rng_state = lambda *_, **__: torch.random.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.random.set_rng_state(state)
    # all_to_all split sizes must be numpy, which megatron makes only of tensors that live on a GPU
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


_ready = False


def import_megatron() -> None:
    """Imports megatron.core, on any machine; idempotent. Raises BackendError with the pip command if it is missing."""
    global _ready
    if _ready:
        return
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise BackendError(f"megatron-core is not installed; run: {INSTALL}")
    without_cuda = not torch.cuda.is_available()
    if without_cuda:
        _replace_cuda()
    # Two messages that every start would repeat: no Transformer Engine here; GPTModel will be HybridModel one day.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    with warnings.catch_warnings(), _triton_importable(), cpu_mode():
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401
    if without_cuda:
        _repair_megatron()
    _ready = True


_thread = threading.local()


@contextlib.contextmanager
def cpu_mode() -> Iterator[None]:
    """Inside, in this thread, megatron's CUDA tensors are made on the CPU. Does nothing where CUDA is present."""
    if getattr(_thread, "inside", False) or torch.cuda.is_available():
        yield
        return
    _thread.inside = True
    try:
        with _CudaToCpu():
            yield
    finally:
        _thread.inside = False


def enter_thread() -> None:
    """Enters cpu_mode in the calling thread for the rest of its life: for a thread that runs a backend."""
    if not getattr(_thread, "inside", False) and not torch.cuda.is_available():
        _thread.inside = True
        _CudaToCpu().__enter__()
