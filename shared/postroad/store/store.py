"""One run's metadata in Redis or Valkey. Nothing here is needed to recover samples: that is the log's business."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, ConnectionError, RedisError, TimeoutError

from postroad.cancellation import in_own_task

RETRIES = 40  # with backoff up to 0.5 s: a restart of the server of up to about 20 s goes unnoticed
OPERATION_S = 5.0
CONNECTIONS = 64

_COMPARE_AND_SET = """
local current = redis.call('HGET', KEYS[1], 'version')
if (current or '') ~= ARGV[1] then return {0, current or ''} end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'data', ARGV[3])
return {1, ARGV[2]}
"""
_ACQUIRE = """
local holder = redis.call('HGET', KEYS[1], 'holder')
if holder and holder ~= ARGV[1] then return 0 end
local token = redis.call('HGET', KEYS[1], 'token')
if not token then token = redis.call('INCR', KEYS[2]) end
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'token', token)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return tonumber(token)
"""
_RELEASE = """
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_FENCED_SET = """
local newest = tonumber(redis.call('GET', KEYS[2]) or '0')
if tonumber(ARGV[1]) < newest then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class StoreError(RuntimeError):
    """Redis refused or could not be reached within its deadline."""


class StoreConflict(StoreError):
    """A compare-and-set found another version than it expected: `found` ("" for none)."""

    def __init__(self, key: str, expected: str, found: str) -> None:
        super().__init__(f"{key} is at version {found or 'none'}, not at {expected or 'none'}")
        self.found = found


class LeaseLost(StoreError):
    """Somebody else holds the lease, with a newer fencing token."""


@dataclass(frozen=True)
class Lease:
    """`token` grows with each new holder: a write that carries an older one is refused."""

    name: str
    holder: str
    token: int


class _Client(redis.Redis):
    """Operations that can be cancelled, and that fail as StoreError once their retries are used up."""

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await in_own_task(super().execute_command(*arguments, **options))  # type: ignore[no-untyped-call]
        except (ConnectionError, TimeoutError, BusyLoadingError) as error:
            raise StoreError(f"Redis does not answer: {error}") from error


class Store:
    """Keys of one run. All methods retry over a restart of the server and raise StoreError after that."""

    def __init__(self, client: redis.Redis, binary: redis.Redis, run: str) -> None:
        self.client = client
        self.binary = binary  # the same server, for values that are not text
        self.run = run
        self._compare_and_set = client.register_script(_COMPARE_AND_SET)
        self._acquire = client.register_script(_ACQUIRE)
        self._release = client.register_script(_RELEASE)
        self._fenced_set = client.register_script(_FENCED_SET)

    @classmethod
    async def connect(cls, url: str, run: str, *, deadline_s: float = 30.0) -> Store:
        client, binary = (
            _Client.from_pool(redis.BlockingConnectionPool.from_url(  # what finds none free waits for one
                url, max_connections=CONNECTIONS, timeout=OPERATION_S, decode_responses=text, socket_timeout=OPERATION_S,
                socket_connect_timeout=2.0, retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), RETRIES),
                retry_on_error=[ConnectionError, TimeoutError, BusyLoadingError],
            ))
            for text in (True, False)
        )  # fmt: skip
        # AuthenticationError is a ConnectionError, which the client above retries: knock without retries first
        probe = redis.Redis.from_url(
            url, socket_timeout=2.0, socket_connect_timeout=2.0, retry=Retry(ExponentialBackoff(), 0)
        )
        started = time.monotonic()
        try:
            while True:
                try:
                    await probe.ping()
                    break
                except AuthenticationError as error:
                    raise StoreError("Redis refuses this password: is this the Redis of another run?") from error
                except (RedisError, OSError) as error:
                    if time.monotonic() - started > deadline_s:
                        raise StoreError(f"no Redis answered within {deadline_s:.0f} s: {error!r}") from error
                    await asyncio.sleep(0.1)
        finally:
            await probe.aclose()
        return cls(client, binary, run)

    async def close(self) -> None:
        await self.client.aclose()
        await self.binary.aclose()

    def key(self, *parts: str) -> str:
        return ":".join(("postroad", self.run, *parts))

    # ── documents ────────────────────────────────────────────────────────────────────────────────────────────────
    async def set(self, name: str, value: Any) -> None:
        await self.client.set(self.key("document", name), json.dumps(value))

    async def get(self, name: str) -> Any:
        """The document, or None."""
        text = await self.client.get(self.key("document", name))
        return None if text is None else json.loads(text)

    async def compare_and_set(self, name: str, expected: str, version: str, value: Any) -> None:
        """Replace the versioned document only where it is at `expected` ("" for none). Raises StoreConflict.
        Safe to retry: a conflict with one's own version means that an earlier attempt got through."""
        key = self.key("versioned", name)
        done, found = await self._compare_and_set(keys=[key], args=[expected, version, json.dumps(value)])
        if not done and found != version:
            raise StoreConflict(name, expected, found)

    async def versioned(self, name: str) -> tuple[str, Any]:
        """(version, value) of a document written by compare_and_set; ("", None) where there is none."""
        version, data = await self.client.hmget(self.key("versioned", name), ["version", "data"])
        return (str(version), json.loads(data or "null")) if version is not None else ("", None)

    async def version_of(self, name: str) -> str:
        """The version alone of such a document; "" where there is none."""
        return str(await self.client.hget(self.key("versioned", name), "version") or "")

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────
    async def acquire(self, name: str, holder: str, ttl_s: float) -> Lease:
        """Take or extend the lease. Raises LeaseLost while another holder has it."""
        keys = [self.key("lease", name), self.key("fence", name)]
        token = await self._acquire(keys=keys, args=[holder, int(ttl_s * 1000)])
        if not token:
            raise LeaseLost(f"the lease {name!r} is held by somebody else")
        return Lease(name, holder, int(token))

    async def release(self, lease: Lease) -> None:
        await self._release(keys=[self.key("lease", lease.name)], args=[lease.holder])

    async def set_fenced(self, lease: Lease, name: str, value: Any) -> None:
        """Write a document as the holder of `lease`. Raises LeaseLost where a newer holder exists."""
        keys = [self.key("document", name), self.key("fence", lease.name)]
        if not await self._fenced_set(keys=keys, args=[lease.token, json.dumps(value)]):
            raise LeaseLost(f"{lease.holder} lost the lease {lease.name!r}; {name!r} is not written")

    # ── registries ───────────────────────────────────────────────────────────────────────────────────────────────
    async def register(self, kind: str, member: str, info: dict[str, Any], ttl_s: float) -> None:
        """Say that `member` lives; to be repeated well within `ttl_s`."""
        pipeline = self.client.pipeline(transaction=True)
        pipeline.set(self.key("member", kind, member), json.dumps(info), px=int(ttl_s * 1000))
        pipeline.zadd(self.key("members", kind), {member: time.time() + ttl_s})
        await in_own_task(pipeline.execute())

    async def leave(self, kind: str, member: str) -> None:
        pipeline = self.client.pipeline(transaction=True)
        pipeline.delete(self.key("member", kind, member))
        pipeline.zrem(self.key("members", kind), member)
        await in_own_task(pipeline.execute())

    async def members(self, kind: str) -> dict[str, dict[str, Any]]:
        """Those whose registration has not run out."""
        index = self.key("members", kind)
        await self.client.zremrangebyscore(index, "-inf", time.time() - 60.0)
        names = [str(name) for name in await self.client.zrange(index, 0, -1)]
        if not names:
            return {}
        values = await self.client.mget([self.key("member", kind, name) for name in names])
        return {name: json.loads(value) for name, value in zip(names, values, strict=True) if value is not None}
