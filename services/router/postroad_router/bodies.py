"""What clients send, read within bounds."""

from __future__ import annotations

from typing import Any

import msgpack
import orjson
from starlette.requests import Request

from postroad_router.errors import ApiError

BODY_BYTES = 16 * 1024 * 1024
BODY_DEPTH = 64
HEADERS = {"x-postroad-minimum-version": "minimum_version", "x-postroad-version": "version"}


async def read_bytes(request: Request) -> bytes:
    """Raises ApiError 413."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > BODY_BYTES:
            raise ApiError(413, f"the body exceeds {BODY_BYTES} bytes", code="body_too_large")
    return bytes(data)


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object, and what headers add to it. Raises ApiError 400 or 413."""
    try:
        body = orjson.loads(await read_bytes(request))
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}", code="invalid_json")
    if too_deep(body):
        raise ApiError(400, f"the body is nested deeper than {BODY_DEPTH} levels", code="body_too_deep")
    given = {name: request.headers[header] for header, name in HEADERS.items() if header in request.headers}
    return {name: int(text) if text.isdecimal() and len(text) < 10 else text for name, text in given.items()} | body


async def read_msgpack(request: Request) -> dict[str, Any]:
    """The map. Raises ApiError 400 or 413."""
    try:
        body = msgpack.unpackb(await read_bytes(request), strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ApiError(400, f"the body is not valid msgpack: {error!r}", code="invalid_msgpack") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a map, not {type(body).__name__}", code="invalid_msgpack")
    return body


def too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(BODY_DEPTH):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True
