"""A program or function that knows nothing of postroad: it is handed an OpenAI base URL and a key, and its session is
what is trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from postroad.messages import Task
from postroad.supervisor.processes import die_with_parent
from postroad_rollout.worker.agents.base import Attempt, recorded
from postroad_rollout.worker.errors import AgentSettingsError
from postroad_rollout.worker.model_client import MODEL, ModelClient

TAIL = 2000
OUTPUT_BYTES = 1 << 20


class BlackBox:
    """Exactly one of `command`, started with OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL in its environment, and
    `function`, the dotted path of an async function that is called as function(task, base_url, api_key). Either gets the
    task as {prompt, metadata, sampling, group, member}, a command as JSON on its standard input. It should sample as
    `sampling` says. A command that fails, like a function that raises, is tried again and trains nothing."""

    def __init__(self, command: list[str] | None = None, function: str | None = None) -> None:
        if (command is None) == (function is None):
            raise AgentSettingsError("black_box needs exactly one of command and function")
        self.command = command
        self.function = None if function is None else _function(function)

    async def run(self, task: Task, model: ModelClient) -> Attempt:
        given = {
            "prompt": task.prompt, "metadata": task.reward.metadata, "sampling": task.sampling.model_dump(),
            "group": task.group, "member": model.member,
        }  # fmt: skip
        async with model.endpoint() as (url, key):
            if self.function is not None:
                await self.function(given, url, key)
            else:
                await self._command(given, url, key)
        return await recorded(model)

    async def _command(self, given: dict[str, Any], url: str, key: str) -> None:
        """Raises RuntimeError with the last words where it fails. Cancelled, it kills the process and what that started."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("POSTROAD_")}
        environment |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "OPENAI_MODEL": MODEL}
        process = await asyncio.create_subprocess_exec(
            *(self.command or ()), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, env=environment, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            words = await _talk(process, json.dumps(given).encode())
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if code:
            raise RuntimeError(f"{(self.command or [''])[0]} ended with {code}: {words.decode(errors='replace')}")


async def _talk(process: asyncio.subprocess.Process, given: bytes) -> bytes:
    """Give it its input; the last of its standard error, when that ends."""
    assert process.stdin is not None and process.stderr is not None
    with contextlib.suppress(ConnectionError):  # it need not read it
        process.stdin.write(given)
        await process.stdin.drain()
    process.stdin.close()
    words = b""
    while data := await process.stderr.read(OUTPUT_BYTES):
        words = (words + data)[-TAIL:]
    return words


def _function(path: str) -> Callable[[dict[str, Any], str, str], Awaitable[Any]]:
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Awaitable[Any]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise AgentSettingsError(f"function {path!r} can't be imported: {error}") from error
    if not inspect.iscoroutinefunction(found):
        raise AgentSettingsError(f"function {path!r} must be async")
    return found
