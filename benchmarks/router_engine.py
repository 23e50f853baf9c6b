"""The engine of benchmarks/router.py: a real HTTP server that streams tokens at a fixed rate and notes when.

It speaks SGLang's /generate (as router and engines of the mesh do) and /v1/chat/completions (as clients without a router
and sglang-router do); a request's `seed` names it. GET /times gives the moment of every token, of time.monotonic.

    python benchmarks/router_engine.py PORT RATE LAYERS TOP_K
"""

from __future__ import annotations

import asyncio
import base64
import random
import sys
import time
from collections import defaultdict
from typing import Any

import httptools
import orjson
import uvloop

EVENT = b"data: %b\n\n"
CHUNK = b"%x\r\n%b\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
TOKEN = 64  # "a" of the benchmark's tokenizer
ROUTES = (
    b"/health",
    b"/health_generate",
    b"/v1/models",
    b"/model_info",
    b"/get_model_info",
    b"/server_info",
    b"/get_server_info",
)


class Engine:
    """Settings, and what has been sent."""

    def __init__(self, rate: float, layers: int, top_k: int) -> None:
        self.rate, self.layers, self.top_k = rate, layers, top_k
        self.times: dict[int, list[float]] = defaultdict(list)
        self.chat = orjson.dumps({
            "id": "c", "object": "chat.completion", "created": 1, "model": "model",
            "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "a"}}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        })  # fmt: skip


class Connection(asyncio.Protocol):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", bytearray()
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._streaming is not None:
            self._streaming.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body = b"", bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0]
        if path == b"/times":
            self._answer(orjson.dumps([[key, value] for key, value in self._engine.times.items()]))
            self._engine.times.clear()
        elif path in ROUTES:
            self._answer(orjson.dumps({"model_path": "model", "served_model_name": "model", "data": [{"id": "model"}]}))
        else:
            self._generate(path, orjson.loads(self._body))

    def _answer(self, body: bytes) -> None:
        head = HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _generate(self, path: bytes, body: dict[str, Any]) -> None:
        chat = path.endswith(b"completions")
        sampling = body if chat else body["sampling_params"]
        lengths = ("max_tokens", "max_completion_tokens") if chat else ("max_new_tokens",)
        count = next(sampling[name] for name in lengths if sampling.get(name) is not None)
        seed = sampling.get("seed" if chat else "sampling_seed")
        if chat and not body.get("stream"):
            self._answer(self._engine.chat)
        elif count == 1:  # a short request is answered at once
            self._transport.write(
                self._start() + self._chunk(chat, body, 1, 1) + CHUNK % (14, b"data: [DONE]\n\n") + CHUNK % (0, b"")
            )
        else:
            self._streaming = asyncio.get_running_loop().create_task(self._stream(chat, body, count, seed))

    def _start(self) -> bytes:
        return HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n"

    async def _stream(self, chat: bool, body: dict[str, Any], count: int, seed: int | None) -> None:
        times = self._engine.times[seed] if seed is not None else []
        loop = asyncio.get_running_loop()
        self._transport.write(self._start())
        due = loop.time() + random.random() / self._engine.rate
        for number in range(1, count + 1):
            chunk = self._chunk(chat, body, number, count)
            await asyncio.sleep(due - loop.time())
            times.append(time.monotonic())
            self._transport.write(chunk)
            due += 1 / self._engine.rate
        self._transport.write(CHUNK % (14, b"data: [DONE]\n\n") + CHUNK % (0, b""))

    def _chunk(self, chat: bool, body: dict[str, Any], number: int, count: int) -> bytes:
        over = number == count
        if chat:
            choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": "length" if over else None}
            value: dict[str, Any] = {
                "id": "c",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "model",
                "choices": [choice],
            }
        else:
            meta: dict[str, Any] = {
                "id": "r", "finish_reason": {"type": "length", "length": count} if over else None, "prompt_tokens": 9,
                "completion_tokens": number, "weight_version": "1", "output_token_logprobs": [[-0.5, TOKEN, None]],
            }  # fmt: skip
            if over and body.get("return_routed_experts"):
                rows = len(body["input_ids"]) + count - 1 - body.get("routed_experts_start_len", 0)
                meta["routed_experts"] = base64.b64encode(
                    bytes(rows * self._engine.layers * self._engine.top_k * 4)
                ).decode()
            value = {"text": "a", "output_ids": [TOKEN], "meta_info": meta}
        event = EVENT % orjson.dumps(value)
        return CHUNK % (len(event), event)


async def serve(port: int, engine: Engine) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=2048)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), Engine(float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
