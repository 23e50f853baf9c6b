"""Prefill/decode disaggregation: a prompt's keys and values go from one engine's process to another's.

SGLang's handshake: both engines get the same request with the prefill engine's `bootstrap_host` and `bootstrap_port`
and a `bootstrap_room`; the decode engine calls there and fetches what was computed for the room. On the wire: frames
of a 4-byte length and a msgpack map; the payload follows its header. Whoever calls proves that he knows the mesh's
secret without sending it, because the address comes out of a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from .errors import HandoverError

ROOM_S = 30.0  # how long one side waits for the other
ROOMS = 4096
HEADER_BYTES = 64 * 1024
CHUNK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Address:
    """Where a request's prompt is handed over."""

    host: str
    port: int
    room: int


@dataclass(frozen=True)
class Handover:
    """What was computed of all but the last token of a prompt: `keys_values` [layers, 2, kv_heads, tokens, head_dim],
    `experts` [tokens, MoE layers, top-k], and the weights that did it."""

    version: int
    digest: str
    tokens: NDArray[np.int32]
    keys_values: torch.Tensor
    experts: NDArray[Any]

    def parts(self) -> list[memoryview]:
        keys_values = self.keys_values.contiguous().view(-1).view(torch.uint8).numpy()
        return [keys_values.data, np.ascontiguousarray(self.experts).reshape(-1).view(np.uint8).data]

    def header(self, parts: list[memoryview]) -> dict[str, Any]:
        return {
            "version": self.version, "digest": self.digest, "tokens": xxhash.xxh3_128_hexdigest(self.tokens.tobytes()),
            "dtype": str(self.keys_values.dtype), "shape": list(self.keys_values.shape),
            "experts": [self.experts.dtype.str, list(self.experts.shape)],
            "sizes": [len(part) for part in parts], "checksums": [xxhash.xxh3_128_hexdigest(part) for part in parts],
        }  # fmt: skip


@dataclass(frozen=True)
class Room:
    """The prefill engine sets `offered`; `fetched` is what went wrong, or "" once the decode engine has it all."""

    offered: asyncio.Future[Handover]
    fetched: asyncio.Future[str]


class Bootstrap:
    """The prefill engine's side: rooms that are offered once and fetched once."""

    def __init__(self, secret: str | None) -> None:
        self._secret = secret or ""
        self._rooms: dict[int, Room] = {}
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; the port."""
        self._server = await asyncio.start_server(self._serve, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    @asynccontextmanager
    async def room(self, number: int) -> AsyncIterator[Room]:
        """On leaving, the room is gone, and whoever waits in it is told so."""
        room = self._enter(number)
        try:
            yield room
        finally:
            self._rooms.pop(number, None)
            room.offered.cancel()

    def _enter(self, number: int) -> Room:
        if number not in self._rooms:
            if len(self._rooms) >= ROOMS:
                raise HandoverError(f"{ROOMS} rooms are open; try again later")
            loop = asyncio.get_running_loop()
            self._rooms[number] = Room(loop.create_future(), loop.create_future())
            loop.call_later(2 * ROOM_S, self._rooms.pop, number, None)  # where the other side never comes
        return self._rooms[number]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(2 * ROOM_S):
                hello = await _read_frame(reader)
                if not hmac.compare_digest(_proof(self._secret, hello["room"], hello["nonce"]), hello["proof"]):
                    await _write_frame(writer, {"error": "the proof of the mesh's secret is wrong"})
                    return
                await self._hand_over(hello["room"], reader, writer)
        except (OSError, ValueError, KeyError, TypeError, asyncio.IncompleteReadError, HandoverError, TimeoutError):
            return  # a caller who leaves or talks nonsense: its own side says so
        finally:
            writer.close()

    async def _hand_over(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        room = self._enter(number)
        await asyncio.wait({room.offered}, timeout=ROOM_S)
        if not room.offered.done() or room.offered.cancelled():
            await _write_frame(writer, {"error": f"nothing was computed for room {number}"})
            return
        handover, fault = room.offered.result(), ""
        try:
            parts = handover.parts()
            await _write_frame(writer, handover.header(parts))
            for part in parts:
                for start in range(0, len(part), CHUNK_BYTES):
                    writer.write(part[start : start + CHUNK_BYTES])
                    await writer.drain()
            await reader.readexactly(1)
        except (OSError, asyncio.IncompleteReadError) as error:
            fault = f"room {number} was left before all was fetched: {error!r}"
        if not room.fetched.done():
            room.fetched.set_result(fault)


async def fetch(address: Address, secret: str | None, tokens: list[int]) -> Handover:
    """The decode engine's side: what the prefill engine computed for `tokens`. Raises HandoverError."""
    try:
        async with asyncio.timeout(ROOM_S):
            reader, writer = await asyncio.open_connection(address.host, address.port, limit=CHUNK_BYTES)
            try:
                nonce = secrets.token_bytes(16)
                proof = _proof(secret or "", address.room, nonce)
                await _write_frame(writer, {"room": address.room, "nonce": nonce, "proof": proof})
                header = await _read_frame(reader)
                if "error" in header:
                    raise HandoverError(str(header["error"]))
                payload = [await reader.readexactly(size) for size in header["sizes"]]
                handover = _checked(header, payload, tokens)
                writer.write(b"\x01")
                await writer.drain()
                return handover
            finally:
                writer.close()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        asyncio.IncompleteReadError,
        TimeoutError,
    ) as error:
        raise HandoverError(
            f"{address.host}:{address.port} did not hand over room {address.room}: {error!r}"
        ) from error


def _checked(header: dict[str, Any], payload: list[bytes], tokens: list[int]) -> Handover:
    if [xxhash.xxh3_128_hexdigest(part) for part in payload] != header["checksums"]:
        raise HandoverError("the keys and values were damaged on their way")
    own = np.array(tokens, np.int32)
    if xxhash.xxh3_128_hexdigest(own.tobytes()) != header["tokens"]:
        raise HandoverError("the keys and values are of another prompt")
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[header["dtype"]]
    keys_values = torch.frombuffer(bytearray(payload[0]), dtype=dtype) if payload[0] else torch.empty(0, dtype=dtype)
    kind, shape = header["experts"]
    experts = np.frombuffer(payload[1], np.dtype(kind)).reshape(shape)
    return Handover(header["version"], header["digest"], own, keys_values.reshape(header["shape"]), experts)


def _proof(secret: str, room: int, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), b"%d:" % room + nonce, hashlib.sha256)


async def _write_frame(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    data = msgpack.packb(value)
    writer.write(struct.pack("<I", len(data)) + data)
    await writer.drain()


async def _read_frame(reader: asyncio.StreamReader) -> dict[str, Any]:
    (size,) = struct.unpack("<I", await reader.readexactly(4))
    if size > HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    value = msgpack.unpackb(await reader.readexactly(size))
    if not isinstance(value, dict):
        raise ValueError("a header that is no map")
    return value
