"""Bearer keys: the mesh's own, and those that an administrator gives out, of which Redis holds hashes alone."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

from postroad.store import Store
from postroad_router.redis_errors import asked

Scope = Literal["agent", "worker", "admin"]
RANKS: dict[str, int] = {"agent": 0, "worker": 1, "admin": 2}
REMEMBERED_S = 5.0  # how long a key that was withdrawn may go on
REMEMBERED_KEYS = 4096


@dataclass(frozen=True)
class Identity:
    """Whose key it is. An agent's may be bound to one session."""

    name: str
    scope: Scope
    session: str = ""

    def may(self, scope: Scope) -> bool:
        return RANKS[self.scope] >= RANKS[scope]


class Keys:
    """Raises ApiError 503 where Redis is needed and does not answer."""

    def __init__(self, store: Store, mesh_key: str) -> None:
        self._store, self._mesh = store, mesh_key.encode()
        self._known: dict[str, tuple[Identity | None, float]] = {}

    async def identity(self, key: str) -> Identity | None:
        if hmac.compare_digest(key.encode(), self._mesh):
            return Identity("mesh", "admin")
        digest = _digest(key)
        found, until = self._known.get(digest, (None, 0.0))
        if time.monotonic() < until:
            return found
        if len(self._known) >= REMEMBERED_KEYS:
            self._known.clear()
        text = await asked(self._store.client.hget(self._table, digest))
        entry = json.loads(text) if text else None
        identity = _identity(entry) if entry and entry["expires"] > time.time() else None
        self._known[digest] = (identity, time.monotonic() + REMEMBERED_S)
        return identity

    async def create(self, name: str, scope: Scope, session: str, ttl_s: float) -> str:
        """A new key, which is told this once."""
        key = "sk-postroad-" + secrets.token_urlsafe(32)
        entry = {"name": name, "scope": scope, "session": session, "expires": time.time() + ttl_s}
        await asked(self._store.client.hset(self._table, _digest(key), json.dumps(entry)))
        self._known.clear()
        return key

    async def delete(self, name: str) -> int:
        """How many keys of this name, or run out, are withdrawn."""
        table = await asked(self._store.client.hgetall(self._table))
        entries = {digest: json.loads(text) for digest, text in table.items()}
        gone = [digest for digest, entry in entries.items() if entry["name"] == name or entry["expires"] < time.time()]
        if gone:
            await asked(self._store.client.hdel(self._table, *gone))
        self._known.clear()
        return len(gone)

    @property
    def _table(self) -> str:
        return self._store.key("keys")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _identity(entry: dict[str, Any]) -> Identity:
    return Identity(entry["name"], entry["scope"], entry["session"])
