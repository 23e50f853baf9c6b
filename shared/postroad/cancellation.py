"""Cancelling what a library awaits.

nats-py turns a cancelled fetch into ConnectionClosedError, and redis-py's asyncio.wait_for can swallow a cancellation on
Python 3.11. Run in a task of its own, such an operation can't take its caller's cancellation away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_Result = TypeVar("_Result")


async def in_own_task(operation: Awaitable[_Result]) -> _Result:
    """The operation's result. Cancelled, it cancels the operation, waits for its end, and stays cancelled."""
    task = asyncio.ensure_future(operation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # retrieved: the caller is gone
        raise
