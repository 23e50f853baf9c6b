"""Frames between the service and a grader's process: a big-endian length of 4 bytes, then msgpack."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, BinaryIO

import msgpack

LIMIT_BYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class FrameError(ValueError):
    """Bytes that are no frame."""


def pack(value: dict[str, Any]) -> bytes:
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return _LENGTH.pack(len(data)) + data


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None at the end of the stream."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    return _unpack(stream.read(_checked(header)))


async def read_async(stream: asyncio.StreamReader) -> dict[str, Any]:
    """The next frame. Raises IncompleteReadError at the end of the stream; the caller sets the deadline."""
    size = _checked(await stream.readexactly(_LENGTH.size))
    return _unpack(await stream.readexactly(size))


def _checked(header: bytes) -> int:
    size: int = _LENGTH.unpack(header)[0]
    if size > LIMIT_BYTES:
        raise FrameError(f"a frame of {size} bytes; at most {LIMIT_BYTES} are allowed")
    return size


def _unpack(data: bytes) -> dict[str, Any]:
    value = msgpack.unpackb(data, raw=False, strict_map_key=False)
    if not isinstance(value, dict):
        raise FrameError(f"a frame must hold a mapping, not {type(value).__name__}")
    return value
