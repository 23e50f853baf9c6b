"""Several async iterators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")
QUEUE = 16


async def merged(sources: list[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """(index, item) of all sources as they come. The first error of any ends all; closing it closes them."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item] | BaseException | None] = asyncio.Queue(QUEUE)
    tasks = [asyncio.create_task(_feed(number, source, queue)) for number, source in enumerate(sources)]
    try:
        running = len(tasks)
        while running:
            entry = await queue.get()
            if entry is None:
                running -= 1
            elif isinstance(entry, BaseException):
                raise entry
            else:
                yield entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    number: int, source: AsyncGenerator[Item, None], queue: asyncio.Queue[tuple[int, Item] | BaseException | None]
) -> None:
    try:
        async with aclosing(source) as items:
            async for item in items:
                await queue.put((number, item))
    except Exception as error:  # noqa: BLE001 (handed on to the reader, who raises it)
        await queue.put(error)
    else:
        await queue.put(None)
