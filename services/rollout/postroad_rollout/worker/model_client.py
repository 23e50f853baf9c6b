"""The model as an agent sees it: one member's calls to the router, retried until the task's deadline."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import random
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from postroad.messages import Task, VersionSpan
from postroad.telemetry.tracing import inject_context
from postroad_rollout.worker.errors import DeadlinePassed, RefusedByEngine, RouterFailure
from postroad_rollout.worker.metrics import RETRIES
from postroad_rollout.worker.routers import Routers

logger = logging.getLogger(__name__)

MODEL = "postroad"  # the name under which a router serves whatever model is trained
REFUSALS = (400, 413, 422)
BACKOFF_S = 0.1
BACKOFF_MAX_S = 2.0
SILENCE_S = 10.0
PROBE_S = 5.0
KEEP_ALIVE_S = 2.0  # less than a server's, so that no request meets a connection that is being closed
EXPERT_TYPES = {"u1": np.uint8, "u2": np.uint16}


@dataclass(frozen=True)
class Completion:
    """One answer, exact to the token. `versions` cover `tokens`; `routed_experts` is [prompt + tokens - 1, MoE
    layers, top-k] or None."""

    prompt: np.ndarray
    tokens: np.ndarray
    log_probabilities: np.ndarray
    versions: list[VersionSpan]
    text: str
    finish_reason: str
    engine: str
    routed_experts: np.ndarray | None = None


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

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer. Raises RouterFailure or RefusedByEngine."""
        url = await self._routers.url()
        asking = asyncio.ensure_future(self._ask(url + path, body))
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

    async def _ask(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        async with self._session.post(url, json=body, headers=inject_context({})) as response:
            return response.status, dict(response.headers), await response.read()

    async def _lives(self, url: str) -> bool:
        try:
            async with asyncio.timeout(PROBE_S), self._session.get(f"{url}/livez") as response:
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False


class ModelClient:
    """Bound to one member of a task: its sampling, seed, oldest allowed version and deadline."""

    def __init__(self, connection: Connection, task: Task, member: int) -> None:
        self._connection, self.task, self.member = connection, task, member
        self.retries = 0

    async def complete(self, messages: list[dict[str, Any]], max_new_tokens: int | None = None) -> Completion:
        """The model's answer to `messages`. Failures are asked again, with backoff, for as long as the caller waits:
        the group runner ends it at the task's deadline. Raises RefusedByEngine and DeadlinePassed."""
        attempt = 0
        while True:
            try:
                answer = await self._connection.post("/v1/chat/completions", self._body(messages, max_new_tokens))
                return read_completion(answer, self.task)
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
            "min_p": sampling.min_p, "return_token_ids": True, "minimum_version": self.task.minimum_version,
            "timeout_s": max(self.task.deadline - time.time(), 0.001),
            "routed_experts": self.task.features.routed_experts,
        }  # fmt: skip
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed + self.member
        return body


def _answer(status: int, headers: dict[str, str], text: bytes) -> Any:
    if status in REFUSALS:
        raise RefusedByEngine(f"{status}: {text[:500].decode(errors='replace')}")
    if status != 200:
        retry_after = headers.get("Retry-After", "")
        raise RouterFailure(
            f"status_{status}", text[:300].decode(errors="replace"),
            min(float(retry_after), BACKOFF_MAX_S) if retry_after.isdigit() else 0.0,
        )  # fmt: skip
    try:
        return json.loads(text)
    except ValueError as error:
        raise RouterFailure("garbage", f"an answer that is not JSON: {error}") from error


def read_completion(answer: Any, task: Task) -> Completion:
    """The answer's tokens. Raises RouterFailure where it is not exact: nothing half right becomes a trajectory."""
    try:
        choice = answer["choices"][0]
        tokens = np.asarray(choice["token_ids"], dtype=np.int32)
        log_probabilities = np.asarray(choice["token_logprobs"], dtype=np.float32)
        prompt = np.asarray(choice["prompt_token_ids"], dtype=np.int32)
        digests = choice["digests"]
        versions = [
            VersionSpan(start=start, end=end, version=version, digest=digests.get(str(version), ""))
            for start, end, version in choice["versions"]
        ]
        experts = _experts(choice["routed_experts"]) if task.features.routed_experts else None
        text, finish, engine = choice["message"]["content"], choice["finish_reason"], choice["engine"]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, binascii.Error, OverflowError) as error:
        raise RouterFailure("garbage", f"an answer that lacks what was asked for: {error!r}") from error
    exact = tokens.shape == log_probabilities.shape == (len(tokens),) and len(tokens) > 0 and len(prompt) > 0
    covered = sum(span.end - span.start for span in versions) == len(tokens)
    fresh = all(span.version >= task.minimum_version for span in versions)
    if not exact or not covered or not fresh or not np.isfinite(log_probabilities).all():
        raise RouterFailure("garbage", f"{len(tokens)} tokens with versions {choice['versions']}, not exact")
    if experts is not None and (experts.ndim != 3 or len(experts) != len(prompt) + len(tokens) - 1):
        raise RouterFailure("garbage", f"routed experts {experts.shape} for {len(prompt)} + {len(tokens)} tokens")
    return Completion(prompt, tokens, log_probabilities, versions, str(text), str(finish), str(engine), experts)


def _experts(value: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(value["data"], validate=True)
    return np.frombuffer(data, np.dtype(EXPERT_TYPES[value["dtype"]]).newbyteorder("<")).reshape(value["shape"])
