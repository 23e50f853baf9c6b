"""The engine: one thread owns the model and the scheduler; everybody else talks to it through a bounded queue."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .cache import SlotCache
from .errors import ActivationError, EngineBusyError
from .model import Model
from .request import Request
from .scheduler import Scheduler, Served
from .settings import EngineSettings
from .weights import ModelConfig, Weights

ActivateMode = Literal["finish", "continue", "keep_kv"]
PauseMode = Literal["abort", "retract", "in_place"]
COMMAND_DEADLINE_S = 30.0  # a command is answered between two steps
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot for heartbeats and metrics."""

    version: int
    digest: str
    healthy: bool
    paused: bool
    running: int
    waiting: int
    slots: int
    tokens: int
    max_length: int
    pause_ms: float


@dataclass(frozen=True)
class _Switch:
    weights: Weights
    version: int
    digest: str
    mode: ActivateMode
    done: Future[float]


def pick_dtype(name: str) -> torch.dtype:
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


class Engine:
    """Verbs: start, close; submit, abort; pause, resume, flush; stage, activate, relabel; status. All thread-safe."""

    def __init__(self, settings: EngineSettings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.config = config = ModelConfig.load(settings.model_path)
        self.max_length = min(settings.max_length or 2048, config.max_positions)
        self.dtype, device = pick_dtype(settings.dtype), settings.device
        weights = Weights.load(settings.model_path, config, self.dtype, device)
        self._served = Served(weights, settings.weight_version, settings.weight_digest)
        tokenizer = settings.model_path / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None
        cache = SlotCache(config, settings.slots, self.max_length, self.dtype, device)
        model = Model(config, self.max_length, self.dtype, device)
        self._scheduler = Scheduler(model, cache, self.tokenizer, settings.prefill_tokens)
        self.counters = self._scheduler.counters
        self.seeds = random.Random(settings.seed)
        self.on_failure: Callable[[], None] = lambda: None
        self._commands: queue.Queue[Callable[[], object]] = queue.Queue(settings.max_waiting + 64)
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._closing = self._paused = self._failed = False
        self._switch: _Switch | None = None
        self._staging_lock = threading.Lock()
        self._staging: Weights | None = None
        self._staged: set[str] = set()
        self._pause_ms = 0.0

    def start(self) -> None:
        self._thread.start()

    def close(self, deadline_s: float = 1.0) -> None:
        """End all requests as aborted and stop the loop; a step that outlasts the deadline dies with the process."""
        self._closing = True
        if self._thread.ident is not None:
            self._thread.join(deadline_s)

    def submit(self, requests: list[Request]) -> None:
        """Queue requests, all or none; raises EngineBusyError when the waiting queue has no room for them."""
        if self._closing or self._failed:
            raise EngineBusyError("The engine is shutting down; send the request to another one.")
        waiting = len(self._scheduler.waiting) + self._commands.qsize()
        if waiting + len(requests) > self.settings.max_waiting:
            raise EngineBusyError(f"{waiting} requests are waiting, the limit is {self.settings.max_waiting}; retry.")
        self._put(lambda: self._scheduler.waiting.extend(requests))

    def abort(self, rid: str | None) -> None:
        """End a request, or all of them (None), with what they have; an unknown id is ignored."""
        self._put(lambda: self._scheduler.abort(rid, "aborted by request"))

    def pause(self, mode: PauseMode) -> None:
        """Stop stepping. abort ends all requests, retract drops their keys, in_place freezes them as they are."""

        def apply() -> None:
            self._paused = True
            if mode == "abort":
                self._scheduler.abort(None, "aborted by pause_generation")
            elif mode == "retract":
                self._scheduler.retract()

        self._call(apply)

    def resume(self) -> None:
        def apply() -> None:
            self._paused = False

        self._call(apply)

    def flush(self) -> bool:
        """Forget all prefixes; False (and nothing done) while requests are running or waiting."""

        def apply() -> bool:
            if self._scheduler.running or self._scheduler.waiting:
                return False
            self._scheduler.cache.forget()
            return True

        return self._call(apply)

    def relabel(self, version: int, digest: str | None = None) -> None:
        """Rename the served weights without changing them; the digest stays unless one is given."""

        def apply() -> None:
            kept = self._served.digest if digest is None else digest
            self._served = Served(self._served.weights, version, kept)

        self._call(apply)

    def stage(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy tensors (Hugging Face names) next to the served ones; may be called several times before `activate`.

        Raises TensorError, and whatever the iterable raises; then all that was staged is dropped. The served weights
        are never touched. Tensors that are not staged keep their served values."""
        with self._staging_lock:
            try:
                if self._staging is None:
                    self._staging = Weights(self.config, self.dtype, self.settings.device)
                with torch.inference_mode():
                    self._staged |= self._staging.copy_in(named_tensors)
            except BaseException:
                self._staged = set()
                raise

    def activate(
        self, version: int, digest: str, mode: ActivateMode = "continue", deadline_s: float | None = None
    ) -> float:
        """Serve the staged weights as `version` from the next step on -> length of the switch in ms.

        finish drains running requests first while waiting ones wait; continue keeps tokens and computes keys anew;
        keep_kv goes on with the old keys. Raises ActivationError when nothing is staged or the drain outlasts the
        deadline; the old weights are served on, and what was staged stays staged."""
        with self._staging_lock:
            if self._staging is None or not self._staged:
                raise ActivationError(f"Version {version} can't be activated: nothing is staged. Call stage first.")
            with torch.inference_mode():
                for name in self._staging.views.keys() - self._staged:
                    self._staging.views[name].copy_(self._served.weights.views[name])
            switch = _Switch(self._staging, version, digest, mode, Future())
            old = self._served.weights
            self._call(lambda: setattr(self, "_switch", switch))
            deadline_s = deadline_s or self.settings.activate_deadline_s
            try:
                pause_ms = switch.done.result(deadline_s)
            except TimeoutError:
                if switch.done.cancel():
                    raise ActivationError(
                        f"Version {version} was not activated: requests did not finish within {deadline_s} s."
                    ) from None
                pause_ms = switch.done.result(COMMAND_DEADLINE_S)
            self._staging, self._staged = old, set()
            return pause_ms

    @property
    def status(self) -> EngineStatus:
        served, scheduler = self._served, self._scheduler
        return EngineStatus(
            version=served.version,
            digest=served.digest,
            healthy=self._thread.is_alive() and not self._failed and not self._closing,
            paused=self._paused,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=self.settings.slots,
            tokens=int(scheduler.cache.length[scheduler.cache.busy].sum()),
            max_length=self.max_length,
            pause_ms=self._pause_ms,
        )

    def _put(self, command: Callable[[], object]) -> None:
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            raise EngineBusyError("The engine's command queue is full; retry.") from None

    def _call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the model loop, between two steps, and wait for its result."""
        done: Future[Any] = Future()
        self._put(lambda: done.set_result(function()))
        try:
            return done.result(COMMAND_DEADLINE_S)
        except TimeoutError:
            raise EngineBusyError(f"The model loop did not answer within {COMMAND_DEADLINE_S} s.") from None

    def _run(self) -> None:
        """The supervision loop of the model: a failed step fails the engine, which must be restarted."""
        torch.set_num_threads(self.settings.threads)
        idle = True
        try:
            while not self._closing:
                self._obey(wait=idle)
                self._switch_if_due()
                idle = self._paused or not self._scheduler.step(self._served)
        except Exception:
            log.exception("the model loop failed")
            self._failed = True
        self._obey(wait=False)
        self._scheduler.abort(None, "the engine failed" if self._failed else "the engine is shutting down")
        if self._switch is not None and self._switch.done.set_running_or_notify_cancel():
            self._switch.done.set_exception(ActivationError("The engine stopped before the switch."))
        if self._failed:
            self.on_failure()

    def _obey(self, wait: bool) -> None:
        while True:
            try:
                self._commands.get(block=wait, timeout=0.1)()
            except queue.Empty:
                return
            wait = False

    def _switch_if_due(self) -> None:
        switch = self._switch
        if switch is None:
            return
        if switch.mode == "finish" and self._scheduler.running and not switch.done.cancelled():
            self._scheduler.admitting = False
            return
        self._switch, self._scheduler.admitting = None, True
        if not switch.done.set_running_or_notify_cancel():
            return
        started = time.perf_counter()
        if switch.mode == "continue":
            self._scheduler.retract()
        self._scheduler.cache.forget()
        self._served = Served(switch.weights, switch.version, switch.digest)
        self._pause_ms = (time.perf_counter() - started) * 1e3
        switch.done.set_result(self._pause_ms)
