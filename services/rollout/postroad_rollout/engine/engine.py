"""The engine: one thread that owns the scheduler and the served weights, and verbs that other threads may call."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .cache import SlotCache
from .errors import ActivationError, EngineBusyError, EngineError, TensorError
from .model import Model
from .request import Request
from .scheduler import Scheduler, Served
from .settings import EngineSettings
from .weights import ModelConfig, Weights

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048
IDLE_S = 5.0
COMMAND_S = 30.0
PauseMode = Literal["abort", "retract", "in_place"]
UpdateMode = Literal["finish", "continue", "keep_kv"]
_Result = TypeVar("_Result")


class Engine:
    """Serves one model. `version` and `digest` name the weights that the next token will be made by."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.config = ModelConfig.load(settings.model_path)
        self.dtype = _dtype(settings.dtype)
        self.max_length = min(settings.max_length or DEFAULT_MAX_LENGTH, self.config.max_positions)
        weights = Weights.load(settings.model_path, self.config, self.dtype, settings.device)
        file = settings.model_path / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
        cache = SlotCache(self.config, settings.slots, self.max_length, self.dtype, settings.device)
        model = Model(self.config, self.max_length, self.dtype, settings.device)
        self.scheduler = Scheduler(model, cache, self.tokenizer, settings.prefill_tokens)
        self.served = Served(weights, settings.weight_version, settings.weight_digest)
        self._spare: Weights | None = None
        self._staged: Weights | None = None
        self._arrived: deque[Request] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Event()
        self._paused = self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)

    @property
    def version(self) -> int:
        return self.served.version

    @property
    def digest(self) -> str:
        return self.served.digest

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End all requests as aborted and the thread with them."""
        self._stopping = True
        self._wake.set()
        self._thread.join(COMMAND_S)

    def join(self) -> None:
        """Wait until the model's thread has ended; `failure` says why."""
        self._thread.join()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────
    def submit(self, request: Request) -> None:
        """Queue a request. Raises EngineBusyError past the bound of waiting requests."""
        if self.failure is not None or self._stopping:
            raise EngineBusyError(f"the engine has stopped: {self.failure or 'it is shutting down'}")
        if len(self._arrived) + len(self.scheduler.waiting) >= self.settings.max_waiting:
            raise EngineBusyError(f"{self.settings.max_waiting} requests are waiting already; try again later")
        self._arrived.append(request)
        self._wake.set()

    def abort(self, rid: str | None, message: str = "aborted") -> int:
        """End a request, or with None all; how many there were."""

        def end() -> int:
            self._take_arrived()
            return self.scheduler.abort(rid, message)

        return self._call(end)

    def default_seed(self, rid: str) -> int:
        """The seed of a request without one: the engine's own and the request's name."""
        return (self.settings.seed << 32) + zlib.crc32(rid.encode())

    def load(self) -> dict[str, int]:
        """Requests running and waiting, and the tokens that the running ones hold."""
        running = list(self.scheduler.running)
        return {
            "running": len(running),
            "waiting": len(self.scheduler.waiting) + len(self._arrived),
            "tokens": sum(request.length for request in running),
        }

    # ── pausing ──────────────────────────────────────────────────────────────────────────────────────────────────
    def pause(self, mode: PauseMode) -> None:
        """Stop generating: ending requests, putting them back in the queue, or keeping them as they are."""

        def stop() -> None:
            self._paused = True
            if mode == "abort":
                self._take_arrived()
                self.scheduler.abort(None, "paused")
            elif mode == "retract":
                self.scheduler.retract()

        self._call(stop)

    def resume(self) -> None:
        def go() -> None:
            self._paused = False

        self._call(go)

    def flush_cache(self) -> None:
        """Forget all prefixes of requests that have ended."""
        self._call(self.scheduler.cache.forget)

    # ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────
    def stage(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a full set of weights beside the served ones, while these go on serving. Raises TensorError, and then
        nothing is staged."""
        self._staged, staged = None, self._spare or Weights(self.config, self.dtype, self.settings.device)
        self._spare = staged  # kept for the next time where this fails
        missing = staged.views.keys() - staged.copy_in(named_tensors)
        if missing:
            raise TensorError(f"{len(missing)} tensors are missing, e.g. {min(missing)}; the weights are not staged.")
        self._staged, self._spare = staged, None

    def activate(self, version: int, digest: str, mode: UpdateMode = "continue") -> float:
        """Serve the staged weights from the next token on; the pause in milliseconds. Raises ActivationError where
        nothing is staged, or where `finish` could not drain within its deadline."""
        if self._staged is None:
            raise ActivationError("no weights are staged: stage a full set first")
        if mode == "finish":
            self._drain()
        return self._call(lambda: self._switch(version, digest, mode))

    def rename(self, version: int, digest: str = "") -> None:
        """Give the served weights another name."""

        def change() -> None:
            self.served.version, self.served.digest = version, digest

        self._call(change)

    def _drain(self) -> None:
        end = time.monotonic() + self.settings.activate_deadline_s
        self.scheduler.admitting = False
        while self._call(lambda: len(self.scheduler.running)):
            if time.monotonic() > end:
                self.scheduler.admitting = True
                self._wake.set()
                raise ActivationError(f"requests still run after {self.settings.activate_deadline_s:.0f} s")
            time.sleep(0.002)

    def _switch(self, version: int, digest: str, mode: UpdateMode) -> float:
        started = time.perf_counter()
        staged = self._staged
        if staged is None:
            raise ActivationError("the staged weights were activated by another call")
        if mode == "keep_kv":
            self.scheduler.cache.forget()
        else:
            self.scheduler.retract()
        self._spare, self._staged = self.served.weights, None
        self.served = Served(staged, version, digest)
        self.scheduler.admitting = True
        return (time.perf_counter() - started) * 1000

    # ── the model's thread ───────────────────────────────────────────────────────────────────────────────────────
    def _call(self, function: Callable[[], _Result]) -> _Result:
        """Run `function` between two steps, on the model's thread."""
        if self.failure is not None or not self._thread.is_alive():
            raise EngineBusyError(f"the engine has stopped: {self.failure or 'it was not started'}")
        future: Future[_Result] = Future()
        self._commands.append((function, future))
        self._wake.set()
        return future.result(COMMAND_S)

    def _loop(self) -> None:
        torch.set_num_threads(self.settings.threads)
        try:
            while not self._stopping:
                self._wake.clear()
                self._run_commands()
                self._take_arrived()
                if self._paused or not self.scheduler.step(self.served):
                    self._wake.wait(IDLE_S)
        except Exception as error:  # the thread's one supervision: what fails here fails every request
            logger.exception("the model's thread failed")
            self.failure = error
        finally:
            self._take_arrived()
            self.scheduler.abort(None, f"the engine stopped: {self.failure or 'shutdown'}")
            self._run_commands()

    def _run_commands(self) -> None:
        while self._commands:
            function, future = self._commands.popleft()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, EngineError):
                    raise

    def _take_arrived(self) -> None:
        while self._arrived:
            self.scheduler.waiting.append(self._arrived.popleft())


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        flags = Path("/proc/cpuinfo").read_text()
        native = torch.cuda.is_available() or "avx512_bf16" in flags or "amx_bf16" in flags
        name = "bfloat16" if native else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
