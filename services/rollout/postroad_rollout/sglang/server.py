"""The SGLang server of one engine: how it is started, when it is ready, and that nothing of it survives."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from postroad.config import Environment, Recipe
from postroad.supervisor.processes import exited, signal_group
from postroad.supervisor.servers import free_port
from postroad_rollout.engine.errors import EngineError
from postroad_rollout.engine.settings import Role

logger = logging.getLogger(__name__)

POLL_S = 0.5
PROBE_S = 10.0
FAILED_PROBES = 6  # in a row, before a server that still runs is given up
RESERVED = ("model-path", "host", "port", "api-key", "weight-version", "context-length", "max-running-requests",
            "random-seed", "enable-return-routed-experts", "served-model-name")  # fmt: skip


class SGLangError(EngineError):
    """SGLang can't be used as it is configured or installed; the message says what to change."""


def arguments_of(
    recipe: Recipe, environment: Environment, port: int, bootstrap_port: int | None = None, role: Role = "mixed"
) -> list[str]:
    """The server's command line: what the recipe decides, then its `rollout.engine.sglang.options` as they are."""
    engine = recipe.rollout.engine
    options = engine.sglang.options
    if taken := sorted(options.keys() & set(RESERVED)):
        raise SGLangError(f"rollout.engine.sglang.options sets {', '.join(taken)}, which the recipe decides elsewhere")
    given: dict[str, Any] = {
        "model-path": str(environment.model), "host": environment.host, "port": port, "dtype": recipe.model.dtype,
        "weight-version": 0, "random-seed": recipe.seed, "context-length": engine.max_length,
        "max-running-requests": engine.slots, "skip-server-warmup": True, "log-level": "warning",
        "enable-return-routed-experts": recipe.rollout.routed_experts,
        "disaggregation-mode": None if role == "mixed" else role, "disaggregation-bootstrap-port": bootstrap_port,
        **options,
    }  # fmt: skip
    return flags(given)


def flags(options: dict[str, Any]) -> list[str]:
    """{"tp-size": 2, "enable-metrics": True} as --tp-size 2 --enable-metrics; False and None are left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, (list, tuple)):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


class SGLangServer:
    """One `sglang.launch_server`, in a process group of its own. `url` is valid from the start."""

    def __init__(
        self, recipe: Recipe, environment: Environment, command: Sequence[str] | None = None, role: Role = "mixed"
    ) -> None:
        self.port = environment.port or free_port()
        self.bootstrap_port = free_port() if role == "prefill" else None
        self.url = f"http://{environment.host}:{self.port}"
        self._environment = {**os.environ, "POSTROAD_KEY": environment.key}
        self._command = list(command or _launcher()) + arguments_of(
            recipe, environment, self.port, self.bootstrap_port, role
        )
        self._deadline_s = recipe.rollout.engine.sglang.start_deadline_s
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        # its output is ours: the supervisor and the container keep the log
        self._process = subprocess.Popen(self._command, env=self._environment, start_new_session=True)

    async def ready(self) -> None:
        """Returns when the server answers its health check. Raises RuntimeError where it ends before, or is too slow."""
        assert self._process is not None
        end = time.monotonic() + self._deadline_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_S)) as session:
            while not await self.healthy(session):
                if self._process.poll() is not None:
                    raise RuntimeError(f"SGLang ended with code {self._process.returncode} before it was ready")
                if time.monotonic() > end:
                    raise RuntimeError(f"SGLang was not ready within {self._deadline_s:.0f} s "
                                       "(rollout.engine.sglang.start_deadline_s)")  # fmt: skip
                await asyncio.sleep(POLL_S)

    async def healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def watch(self) -> None:
        """Raises RuntimeError when the server has ended, or answers no probe for FAILED_PROBES times."""
        assert self._process is not None
        ended = asyncio.create_task(exited(self._process))
        failed = 0
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_S)) as session:
                while not (await asyncio.wait({ended}, timeout=PROBE_S))[0]:
                    failed = 0 if await self.healthy(session) else failed + 1
                    if failed == FAILED_PROBES:
                        raise RuntimeError(f"SGLang answered none of {failed} health checks")
            raise RuntimeError(f"SGLang ended with code {ended.result()}")
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def kill(self) -> None:
        """End the server and what it started, at once: the GPU's memory goes back with them."""
        if self._process is not None:
            signal_group(self._process, signal.SIGKILL)
            self._process.wait()


def _launcher() -> list[str]:
    if importlib.util.find_spec("sglang") is None:
        raise SGLangError(f"sglang is not installed for {sys.executable}: pip install sglang, or set "
                          "rollout.engine.sglang.python to the interpreter that has it")  # fmt: skip
    return [sys.executable, "-m", "postroad_rollout.sglang.launcher"]
