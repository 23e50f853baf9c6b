"""The model as an agent sees it: one member's calls to the router, retried until the task's deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgpack
import numpy as np

from postroad.bus import Bus
from postroad.messages import SchemaError, Task, Trajectory, decode, encode
from postroad.telemetry.tracing import inject_context
from postroad_rollout.worker.errors import DeadlinePassed, RefusedByEngine, RouterFailure, SessionLost
from postroad_rollout.worker.metrics import RETRIES
from postroad_rollout.worker.peers import Peers
from postroad_rollout.worker.routers import Routers
from postroad_rollout.worker.tools import Tools

logger = logging.getLogger(__name__)

MODEL = "postroad"  # the name under which a router serves whatever model is trained
REFUSALS = (400, 413, 422)
BACKOFF_S = 0.1
BACKOFF_MAX_S = 2.0
SILENCE_S = 10.0
PROBE_S = 5.0
KEEP_ALIVE_S = 2.0  # less than a server's, so that no request meets a connection that is being closed
FORGET_S = 2.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completion:
    """One answer: the assistant's message as OpenAI has it. Its tokens are in the router's session."""

    message: dict[str, Any]
    finish_reason: str

    @property
    def text(self) -> str:
        return self.message.get("content") or ""


class Connection:
    """HTTP to the router, shared by all members of a worker."""

    def __init__(self, routers: Routers, key: str) -> None:
        self._routers, self._headers = routers, {"Authorization": f"Bearer {key}"}

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            headers=self._headers, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=3.0),
        )  # fmt: skip

    async def close(self) -> None:
        await self._session.close()

    async def url(self) -> str:
        return await self._routers.url()

    async def request(self, method: str, path: str, **content: Any) -> bytes:
        """The answer's body. Raises RouterFailure, RefusedByEngine or SessionLost."""
        url = await self._routers.url()
        asking = asyncio.ensure_future(self._ask(method, url + path, content))
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=SILENCE_S)
                if not asking.done() and not await self._lives(url):
                    raise RouterFailure("silent", f"{url} says nothing and answers no probe")
            return _answer(*asking.result())
        except (aiohttp.ClientError, OSError) as error:
            self._routers.failed(url)
            raise RouterFailure("connection", f"{url}: {error!r}") from error
        except RouterFailure:
            self._routers.failed(url)
            raise
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask(self, method: str, url: str, content: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        async with self._session.request(method, url, headers=inject_context({}), **content) as response:
            return response.status, dict(response.headers), await response.read()

    async def _lives(self, url: str) -> bool:
        try:
            async with asyncio.timeout(PROBE_S), self._session.get(f"{url}/livez") as response:
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False


class ModelClient:
    """Bound to one member of a task: its sampling, seed, oldest allowed version and deadline, and its session at the
    router, which keeps the tokens of all calls."""

    def __init__(self, connection: Connection, bus: Bus, task: Task, member: int, peers: Peers) -> None:
        self._connection, self.task, self.member, self.peers = connection, task, member, peers
        self.session = re.sub(r"[^A-Za-z0-9._~-]", "-", f"{task.group[:80]}.{member}.") + uuid.uuid4().hex
        self.tools = Tools(bus, task, self.session)
        self.retries = 0

    async def complete(
        self,
        messages: list[dict[str, Any]],
        max_new_tokens: int | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        stop: tuple[str, ...] = (),
    ) -> Completion:
        """The model's answer to `messages`, which may call `tools` and ends before a text of `stop` or of the recipe's.
        Raises RefusedByEngine and DeadlinePassed."""
        path = f"/sessions/{self.session}/v1/chat/completions"
        more = {"tools": tools} if tools else {}
        if stops := [*stop, *self.task.sampling.stop]:
            more["stop"] = stops
        return await self._retried(
            lambda: self._connection.request("POST", path, json=self._body(messages, max_new_tokens) | more),
            read_completion,
        )

    @contextlib.asynccontextmanager
    async def endpoint(self) -> AsyncIterator[tuple[str, str]]:
        """An OpenAI base URL and a key for programs that know nothing of postroad; both are good for this attempt's
        session alone, and the key until the end."""
        ttl_s = max(self.task.deadline - time.time(), 1.0)
        body = {"name": self.session, "scope": "agent", "session": self.session, "ttl_s": ttl_s}
        key = await self._retried(
            lambda: self._connection.request("POST", "/keys", json=body), lambda data: str(json.loads(data)["key"])
        )
        try:
            yield f"{await self._connection.url()}/sessions/{self.session}/v1", key
        finally:
            await self._delete(f"/keys/{self.session}")

    async def trajectory(self) -> Trajectory:
        """What the session holds, exact to the token. Raises DeadlinePassed and SessionLost."""
        body = msgpack.packb({"task": encode(self.task), "member": self.member, "keep": "latest"})
        path = f"/sessions/{self.session}/trajectories"
        return await self._retried(
            lambda: self._connection.request("POST", path, data=body), lambda data: read_trajectory(data, self.task)
        )

    async def forget(self) -> None:
        """Let the router forget the session, and tools theirs; they do so by themselves some time later."""
        await self.tools.close()
        await self._delete(f"/sessions/{self.session}")

    async def _delete(self, path: str) -> None:
        try:
            async with asyncio.timeout(FORGET_S):
                await self._connection.request("DELETE", path)
        except (RouterFailure, RefusedByEngine, SessionLost, TimeoutError) as error:
            logger.info("%s stays for a while: %r", path, error)

    async def _retried(self, ask: Callable[[], Awaitable[bytes]], read: Callable[[bytes], Result]) -> Result:
        """Failures are asked again, with backoff, for as long as the caller waits: the group runner ends it at the
        task's deadline."""
        attempt = 0
        while True:
            try:
                return read(await ask())
            except RouterFailure as failure:
                self.retries += 1
                RETRIES.labels(failure.reason).inc()
                pause_s = max(
                    min(BACKOFF_S * 2**attempt, BACKOFF_MAX_S) * random.uniform(0.5, 1.5), failure.retry_after_s
                )
                attempt = min(attempt + 1, 16)
                logger.info("member %d of %s asks again in %.1f s: %s", self.member, self.task.group, pause_s, failure)
                await asyncio.sleep(pause_s)
            if (
                time.time() >= self.task.deadline
            ):  # a cancellation that meets redis-py's wait_for is lost on Python 3.11
                raise DeadlinePassed(f"the model did not answer in {attempt} attempts")

    def _body(self, messages: list[dict[str, Any]], max_new_tokens: int | None) -> dict[str, Any]:
        sampling = self.task.sampling
        body = {
            "model": MODEL, "messages": messages, "max_tokens": max_new_tokens or sampling.max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "min_p": sampling.min_p, "minimum_version": self.task.minimum_version,
            "timeout_s": max(self.task.deadline - time.time(), 0.001),
            "routed_experts": self.task.features.routed_experts,
        }  # fmt: skip
        if sampling.seed is not None:
            body["seed"] = sampling.seed + self.member
        return body


def _answer(status: int, headers: dict[str, str], text: bytes) -> bytes:
    if status in REFUSALS:
        raise RefusedByEngine(f"{status}: {text[:500].decode(errors='replace')}")
    if status == 404:
        raise SessionLost(text[:300].decode(errors="replace"))
    if status not in (200, 204):
        retry_after = headers.get("Retry-After", "")
        raise RouterFailure(
            f"status_{status}", text[:300].decode(errors="replace"),
            min(float(retry_after), BACKOFF_MAX_S) if retry_after.isdigit() else 0.0,
        )  # fmt: skip
    return text


def read_completion(data: bytes) -> Completion:
    """The answer. Raises RouterFailure where it is none."""
    try:
        choice = json.loads(data)["choices"][0]
        return Completion(dict(choice["message"]), str(choice["finish_reason"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RouterFailure("garbage", f"an answer that lacks what was asked for: {error!r}") from error


def read_trajectory(data: bytes, task: Task) -> Trajectory:
    """The newest trajectory. Raises RouterFailure where it is not exact: nothing half right is published."""
    try:
        trajectory = decode(msgpack.unpackb(data)[0])
    except (SchemaError, IndexError, TypeError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise RouterFailure("garbage", f"no trajectory: {error!r}") from error
    if not isinstance(trajectory, Trajectory) or not trajectory.versions:
        raise RouterFailure("garbage", "no trajectory with generated tokens")
    if not np.isfinite(trajectory.log_probabilities).all():
        raise RouterFailure("garbage", "a trajectory whose log-probabilities are not finite")
    if trajectory.oldest_version < task.minimum_version:  # of a black box, whose requests do not say what is too old
        raise SessionLost(
            f"it has tokens of version {trajectory.oldest_version}; {task.minimum_version} is the oldest allowed"
        )
    return trajectory
