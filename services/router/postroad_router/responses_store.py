"""Responses that later ones go on from: each keeps what it added, and the one before it."""

from __future__ import annotations

from typing import Any

import msgpack

from postroad.store import Store
from postroad_router.errors import ApiError
from postroad_router.redis_errors import asked

LONGEST = 1024


class ResponsesStore:
    """Raises ApiError 503 where Redis does not answer, 404 for what is not there or somebody else's."""

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store, self._ttl_ms = store, int(ttl_s * 1000)

    async def keep(
        self, owner: str, previous: str | None, said: list[dict[str, Any]], response: dict[str, Any]
    ) -> None:
        data = msgpack.packb((owner, previous, said, response))
        await asked(self._store.binary.set(self._key(response["id"]), data, px=self._ttl_ms))

    async def messages(self, name: str, owner: str) -> list[dict[str, Any]]:
        """The conversation up to and with this response."""
        parts: list[list[dict[str, Any]]] = []
        following: str | None = name
        while following is not None and len(parts) < LONGEST:
            following, said, _ = await self._read(following, owner)
            parts.append(said)
        return [message for part in reversed(parts) for message in part]

    async def response(self, name: str, owner: str) -> dict[str, Any]:
        return (await self._read(name, owner))[2]

    async def delete(self, name: str, owner: str) -> None:
        await self._read(name, owner)
        await asked(self._store.binary.delete(self._key(name)))

    async def _read(self, name: str, owner: str) -> tuple[str | None, list[dict[str, Any]], dict[str, Any]]:
        data = await asked(self._store.binary.get(self._key(name)))
        whose, previous, said, response = msgpack.unpackb(data) if data else ("", None, [], {})
        if data is None or whose != owner:
            raise ApiError(
                404, f"there is no response {name[:80]}; it was not stored, or was forgotten since",
                param="previous_response_id", code="response_not_found",
            )  # fmt: skip
        return previous, said, response

    def _key(self, name: str) -> str:
        return self._store.key("response", name)
