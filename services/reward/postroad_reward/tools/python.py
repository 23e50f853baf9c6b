"""`python`: code in the sandbox, each call by itself or all calls of an attempt in one interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace

from postroad.config.tools import ToolSection
from postroad_reward.sandbox import Job, Result, Sandbox, Session
from postroad_reward.tools.base import CallFailed, Tool
from postroad_reward.tools.functions import tool_of

IDLE_S = 900.0  # after so long without a call an attempt is taken to be over
REAP_S = 15.0


async def python(code: str) -> None:
    """Run Python code. Returns what it prints."""


async def python_cells(code: str) -> None:
    """Run Python code as a notebook cell: variables last. Returns what it prints and the value of a last expression."""


@dataclass
class _Open:
    """An attempt's interpreter, once it has one. `used` is when its last call ended."""

    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    session: Session | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = field(default_factory=time.monotonic)


class Cells:
    """The interpreters of attempts, each until `end`, or IDLE_S after its last call."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._open: dict[str, _Open] = {}

    async def run(self, name: str, code: str, deadline_s: float) -> Result:
        entry = self._open.setdefault(name, _Open())
        async with entry.turn:
            if entry.session is None:
                entry.session = await entry.stack.enter_async_context(self._sandbox.session())
            try:
                result = await entry.session.run(code, deadline_s)
            except BaseException as error:  # the sandbox may still be at work: it is not for another attempt
                await _leave(entry, error)
                raise
            entry.used = time.monotonic()
            if entry.session.closed:  # by a limit, which the model is told
                await _leave(entry)
            return result

    def knows(self, name: str) -> bool:
        return name in self._open

    async def end(self, name: str) -> None:
        if (entry := self._open.pop(name, None)) is not None:
            async with entry.turn:
                await _leave(entry)

    async def reap(self) -> None:
        """Again and again, end those of attempts that nobody goes on with."""
        while True:
            await asyncio.sleep(REAP_S)
            for name, entry in list(self._open.items()):
                if not entry.turn.locked() and time.monotonic() - entry.used > IDLE_S:
                    await self.end(name)

    async def close(self) -> None:
        for name in list(self._open):
            await self.end(name)


async def _leave(entry: _Open, error: BaseException | None = None) -> None:
    stack, entry.stack, entry.session = entry.stack, contextlib.AsyncExitStack(), None
    await stack.__aexit__(None if error is None else type(error), error, None)


def python_tool(section: ToolSection, sandbox: Sandbox, cells: Cells) -> Tool:
    async def call(code: str, session: str) -> str:
        if section.stateful:
            result = await cells.run(session, code, section.deadline_s)
        else:
            result = await sandbox.run(Job(code, deadline_s=section.deadline_s))
        return told(result, section)

    described = python_cells if section.stateful else python
    tool = tool_of(section, described, lambda given, session: call(given["code"], session))
    return replace(tool, stateful=section.stateful, own_deadline=True)


def told(result: Result, section: ToolSection) -> str:
    """What the model is told. Raises CallFailed where the code did not end well."""
    printed = "\n".join(part.rstrip("\n") for part in (result.stdout, result.stderr) if part)
    if result.status == "ok":
        return printed or "[no output]"
    reason = {
        "error": f"[exit code {result.exit_code}]", "killed": f"[killed by signal {-(result.exit_code or 0)}]",
        "timeout": f"[stopped after {section.deadline_s:g} s]", "memory": "[stopped: out of memory]",
        "output": "[stopped: too much output]",
    }[result.status]  # fmt: skip
    if section.stateful and result.status != "error":
        reason += " [the interpreter starts anew: variables are gone]"
    text = f"{printed}\n{reason}" if printed else reason
    raise CallFailed("timeout" if result.status == "timeout" else "error", text)
