"""What Redis does not do, as clients are told it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from redis.exceptions import RedisError

from postroad.store import StoreError
from postroad_router.errors import ApiError


async def asked(operation: Awaitable[Any] | Any) -> Any:
    """The result of a Redis operation. Raises ApiError 503."""
    try:
        return await operation
    except (RedisError, StoreError, OSError) as error:
        message = f"the store does not answer: {error}"
        raise ApiError(503, message, code="store_unavailable", retry_after_s=1) from error
