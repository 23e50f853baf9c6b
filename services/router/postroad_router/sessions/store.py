"""Sessions in Redis: append-only, one write for a turn, all of it or nothing; forgotten some time after the last turn.

Keys of a session, in one slot of a cluster: `about` (owner, size, counts), `turns` and `records` by number, `experts` in
chunks, and `index` from a turn's key to the numbers that have it, and from a generation's id to its number.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np

from postroad.store import Store
from postroad_router.errors import ApiError
from postroad_router.keys import Identity
from postroad_router.redis_errors import asked
from postroad_router.sessions.tree import Turn

MAX_TURNS = 4096
CHUNK_BYTES = 512 * 1024
PARTS = ("about", "index", "turns", "records", "experts")

# ARGV: owner, ttl in ms, most bytes, most turns, size, id, key, turn, record, the last turn it needs, whether the caller
# may write to anybody's, chunks of experts
_APPEND = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] and ARGV[11] == '0' then return {'foreign', 0} end
local known = redis.call('HGET', KEYS[2], 'id:' .. ARGV[6])
if known then return {'known', tonumber(known)} end
local number = tonumber(redis.call('HGET', KEYS[1], 'turns') or '0')
local size = tonumber(redis.call('HGET', KEYS[1], 'bytes') or '0') + tonumber(ARGV[5])
if tonumber(ARGV[10]) >= number then return {'gone', 0} end
if size > tonumber(ARGV[3]) or number >= tonumber(ARGV[4]) then return {'full', 0} end
if not owner then redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'created', redis.call('TIME')[1]) end
redis.call('HSET', KEYS[1], 'turns', number + 1, 'bytes', size)
redis.call('HSET', KEYS[2], 'id:' .. ARGV[6], number)
local same = redis.call('HGET', KEYS[2], 'key:' .. ARGV[7])
redis.call('HSET', KEYS[2], 'key:' .. ARGV[7], (same and same .. ',' or '') .. number)
redis.call('HSET', KEYS[3], number, ARGV[8])
redis.call('HSET', KEYS[4], number, ARGV[9])
for place = 12, #ARGV do redis.call('HSET', KEYS[5], number .. ':' .. (place - 12), ARGV[place]) end
for place = 1, #KEYS do redis.call('PEXPIRE', KEYS[place], ARGV[2]) end
return {'new', number}
"""


@dataclass(frozen=True)
class About:
    """What is known of a session: `owner` is "" where it does not exist yet."""

    owner: str = ""
    turns: int = 0
    size_bytes: int = 0
    created: int = 0
    version: int | None = None

    def check(self, session: str, caller: Identity) -> None:
        """Raises ApiError 403 for somebody else's session."""
        if self.owner not in ("", caller.name) and not caller.may("worker"):
            raise foreign(session)


@dataclass(frozen=True)
class Record:
    """The rest of a turn, that only its trajectory needs. `versions` are spans of the generated tokens; `messages` are
    those that the request added, and the answer; `experts` [rows, MoE layers, top-k] begin at row `experts_start`."""

    messages: list[dict[str, Any]]
    log_probabilities: np.ndarray
    versions: list[tuple[int, int, int]]
    digests: dict[int, str]
    engine: str
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None
    unmatched: tuple[int, ...] = ()
    experts_start: int = 0
    experts: np.ndarray | None = None

    def pack(self) -> bytes:
        experts = None if self.experts is None else (self.experts.dtype.str, self.experts.shape)
        data: bytes = msgpack.packb((
            self.messages, self.log_probabilities.astype("<f4").tobytes(), self.versions, self.digests, self.engine,
            self.tools, self.variables, self.unmatched, self.experts_start, experts,
        ))  # fmt: skip
        return data

    @classmethod
    def unpack(cls, data: bytes) -> tuple[Record, tuple[str, list[int]] | None]:
        """The record without its experts, and their dtype and shape."""
        messages, values, versions, digests, engine, tools, variables, unmatched, start, experts = msgpack.unpackb(
            data, strict_map_key=False
        )
        record = cls(
            messages, np.frombuffer(values, "<f4"), [tuple(span) for span in versions], digests, engine,
            tools, variables, tuple(unmatched), start,
        )  # fmt: skip
        return record, experts


class SessionStore:
    """Raises ApiError: 503 where Redis does not answer, 409 for a session that is full, 403 for somebody else's."""

    def __init__(self, store: Store, ttl_s: float, limit_bytes: int) -> None:
        self._store, self._client = store, store.binary
        self._ttl_ms, self._limit_bytes = int(ttl_s * 1000), limit_bytes
        self._append = self._client.register_script(_APPEND)

    def _keys(self, session: str) -> list[str]:
        return [self._store.key("session", f"{{{session}}}", part) for part in PARTS]

    async def about(self, session: str) -> About:
        found = await asked(self._client.hgetall(self._keys(session)[0]))
        values = {name.decode(): value.decode() for name, value in found.items()}
        version = values.get("version")
        return About(
            values.get("owner", ""), int(values.get("turns", 0)), int(values.get("bytes", 0)),
            int(values.get("created", 0)), None if version is None else int(version),
        )  # fmt: skip

    async def create(self, session: str, owner: str, version: int | None) -> bool:
        """Take the name; False where it is taken. `version` is the only one that its turns may come from."""
        key = self._keys(session)[0]
        if not await asked(self._client.hsetnx(key, "owner", owner)):
            return False
        fields: dict[str, int] = {"created": int(time.time())} | ({} if version is None else {"version": version})
        await asked(self._client.hset(key, items=[each for pair in fields.items() for each in pair]))
        await asked(self._client.pexpire(key, self._ttl_ms))
        return True

    async def delete(self, session: str) -> bool:
        return bool(await asked(self._client.delete(*self._keys(session))))

    async def with_keys(self, session: str, keys: Sequence[bytes]) -> dict[int, Turn]:
        """The turns that have one of these keys."""
        if not keys:
            return {}
        fields = ["key:" + key.hex() for key in keys]
        found = await asked(self._client.hmget(self._keys(session)[1], fields))
        return await self.turns(session, sorted({int(n) for numbers in found if numbers for n in numbers.split(b",")}))

    async def turns(self, session: str, numbers: Iterable[int]) -> dict[int, Turn]:
        numbers = list(numbers)
        if not numbers:
            return {}
        found = await asked(self._client.hmget(self._keys(session)[2], [str(number) for number in numbers]))
        return {n: Turn.unpack(n, data) for n, data in zip(numbers, found, strict=True) if data is not None}

    async def record(self, session: str, number: int, experts: bool) -> Record:
        keys = self._keys(session)
        data = await asked(self._client.hget(keys[3], str(number)))
        if data is None:
            raise ApiError(404, f"session {session} ended while it was read", code="session_not_found")
        record, form = Record.unpack(data)
        if form is None or not experts:
            return record
        dtype, shape = np.dtype(form[0]), tuple(form[1])
        count = -(-int(np.prod(shape)) * dtype.itemsize // CHUNK_BYTES)
        fields = [f"{number}:{place}" for place in range(count)]
        chunks = await asked(self._client.hmget(keys[4], fields)) if fields else []
        return replace(record, experts=np.frombuffer(b"".join(chunks), dtype).reshape(shape))

    async def number(self, session: str, generation: str) -> int | None:
        """Of the turn that this generation was written as."""
        found = await asked(self._client.hget(self._keys(session)[1], "id:" + generation))
        return None if found is None else int(found)

    async def append(self, session: str, caller: Identity, generation: str, turn: Turn, record: Record) -> int:
        """Write a turn; its number. The same `generation` is written once."""
        raw = b"" if record.experts is None else record.experts.tobytes()
        chunks = [raw[start : start + CHUNK_BYTES] for start in range(0, len(raw), CHUNK_BYTES)]
        head, rest = turn.pack(), record.pack()
        size = len(head) + len(rest) + len(raw)
        outcome, number = await asked(self._append(keys=self._keys(session), args=[
            caller.name, self._ttl_ms, self._limit_bytes, MAX_TURNS, size, generation, turn.key.hex(), head, rest,
            max(turn.parent, turn.follows), int(caller.may("worker")), *chunks,
        ]))  # fmt: skip
        if outcome == b"foreign":
            raise foreign(session)
        if outcome == b"gone":
            raise ApiError(404, f"session {session} ended during this turn", code="session_not_found")
        if outcome == b"full":
            raise self.full(session)
        return int(number)

    def full(self, session: str) -> ApiError:
        return ApiError(
            409, f"session {session} is full: {MAX_TURNS} turns or {self._limit_bytes} bytes (router.session_bytes); "
            "begin a new one", code="session_full",
        )  # fmt: skip

    def is_full(self, about: About) -> bool:
        return about.turns >= MAX_TURNS or about.size_bytes >= self._limit_bytes


def foreign(session: str) -> ApiError:
    return ApiError(403, f"session {session} belongs to another key", code="foreign_session")
