"""Which router a worker talks to: any live one of the registry, kept until it fails."""

from __future__ import annotations

import asyncio
import random

from redis.exceptions import RedisError

from postroad.store import Store, StoreError
from postroad_rollout.worker.errors import RouterFailure

READ_S = 5.0


class Routers:
    """`url` is read from the registry once, and again after each `failed`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._url = ""
        self._suspect = ""
        self._reading = asyncio.Lock()

    async def url(self) -> str:
        """The router's address. Raises RouterFailure where none is registered."""
        async with self._reading:  # one look-up for all members that wait
            if not self._url:
                self._url = await self._find()
            return self._url

    def failed(self, url: str) -> None:
        if url == self._url:
            self._url, self._suspect = "", url

    async def _find(self) -> str:
        try:
            async with asyncio.timeout(READ_S):
                members = await self._store.members("router")
        except (RedisError, StoreError, OSError, TimeoutError) as error:
            raise RouterFailure("no_registry", f"the registry of routers can't be read: {error!r}") from error
        urls = sorted({str(info["url"]).rstrip("/") for info in members.values() if info.get("url")})
        if not urls:
            raise RouterFailure("no_router", "no router is registered")
        return random.choice([url for url in urls if url != self._suspect] or urls)
