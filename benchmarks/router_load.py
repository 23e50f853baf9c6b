"""Clients of benchmarks/router.py: bare sockets, so that what they cost is not taken for the router's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

DEADLINE_S = 120.0
CONTENT = b'"content":"a"'


@dataclass(frozen=True)
class Target:
    """Where requests go, and with which headers."""

    name: str
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def request(self, path: str, body: dict[str, Any] | None, **headers: str) -> bytes:
        data = b"" if body is None else orjson.dumps(body)
        given = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**given, **self.headers, **headers}.items())
        return f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\n{lines}\r\n".encode() + data


class Client(asyncio.Protocol):
    """One connection, one request at a time. `arrivals` are the moments of tokens."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._data = bytearray()
        self._length = -1
        self._searched = 0
        self._done: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    async def ask(self, request: bytes) -> bytes:
        """The answer's body, of a stream with its framing."""
        self.arrivals, self._data, self._length, self._searched = [], bytearray(), -1, 0
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await asyncio.wait_for(self._done, DEADLINE_S)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._data += data
        if self._length < 0 and (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).lower()
            place = head.find(b"content-length:")
            self._length = end + 4 + int(head[place + 15 :].split(b"\r\n")[0]) if place >= 0 else 0
            self._status = head[9:12]
        while (place := self._data.find(CONTENT, self._searched)) >= 0:
            self.arrivals.append(now)
            self._searched = place + len(CONTENT)
        if (self._length > 0 and len(self._data) >= self._length) or (
            self._length == 0 and self._data.endswith(b"\r\n0\r\n\r\n")
        ):
            self._end()

    def _end(self) -> None:
        if self._done is None or self._done.done():
            return
        if self._status == b"200":
            self._done.set_result(bytes(self._data))
        else:
            self._done.set_exception(RuntimeError(bytes(self._data[:600]).decode(errors="replace")))

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionResetError("the connection was closed"))


async def connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


def message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def streams(target: Target, engine: Target, count: int, tokens: int, turns: int = 1) -> list[float]:
    """Milliseconds from the engine's sending of each token to the client's receipt, over `count` streams at a time;
    with more turns each is a session."""
    clients = [await connect(target.port) for _ in range(count)]
    arrivals: dict[int, list[float]] = {}
    run = time.monotonic_ns() % 10**9

    async def one(number: int, client: Client) -> None:
        await asyncio.sleep(number / count)  # not all at once
        messages = [message(f"question {number}")]
        named = {"X-Postroad-Session": f"s{run}-{number}"} if turns > 1 else {}
        for turn in range(turns):
            seed = run * 10**6 + number * 100 + turn
            body = {"model": "postroad", "messages": messages, "max_tokens": tokens, "seed": seed, "stream": True}
            await client.ask(target.request("/v1/chat/completions", body, **named))
            arrivals[seed] = client.arrivals
            messages = [*messages, {"role": "assistant", "content": "a" * tokens}, message("and then?")]

    await asyncio.gather(*(one(number, client) for number, client in enumerate(clients)))
    sent = dict(await times(engine))
    for client in clients:
        client.transport.close()
    late: list[float] = []
    for seed, received in arrivals.items():
        if len(received) != tokens or len(sent[seed]) != tokens:
            raise RuntimeError(f"{target.name}: {len(received)} of {len(sent[seed])} tokens arrived")
        late += [(there - here) * 1000 for here, there in zip(sent[seed], received, strict=True)]
    return late


async def times(engine: Target) -> Sequence[Any]:
    client = await connect(engine.port)
    data = await client.ask(engine.request("/times", None))
    client.transport.close()
    return list(orjson.loads(data[data.find(b"\r\n\r\n") + 4 :]))


async def short(target: Target, count: int, at_a_time: int) -> float:
    """Seconds for `count` requests of one token that are not streamed."""
    left = iter(range(count))

    async def worker() -> None:
        client = await connect(target.port)
        body = {"model": "postroad", "messages": [message("a short question")], "max_tokens": 1}
        request = target.request("/v1/chat/completions", body)
        for _ in left:
            await client.ask(request)
        client.transport.close()

    started = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(at_a_time)))
    return time.monotonic() - started
