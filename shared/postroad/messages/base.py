"""The base of all messages and their encoding: msgpack of the fields, a kind and a schema version.

A reader ignores fields that it does not know, so a field can be added without a new schema version. The schema
version goes up only when old readers would misunderstand a message; they then refuse it instead of guessing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA_VERSION = 1
_kinds: dict[str, type[Message]] = {}


class SchemaError(ValueError):
    """These bytes are not a message that this version of postroad understands."""


class Message(BaseModel):
    """A frozen message. `run` says to which run it belongs; `id` is unique per kind within the run."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)
    kind: ClassVar[str]

    run: str
    id: str

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "kind" in cls.__dict__:
            _kinds[cls.kind] = cls


def encode(message: Message) -> bytes:
    body = message.model_dump(mode="python")
    data: bytes = msgpack.packb({"kind": message.kind, "schema": SCHEMA_VERSION, **body}, use_bin_type=True)
    return data


def decode(data: bytes) -> Message:
    """The message in these bytes. Raises SchemaError with the reason where there is none."""
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:  # TypeError: a list as a key
        raise SchemaError(f"{len(data)} bytes that are not msgpack: {error}") from error
    if not isinstance(body, dict) or "kind" not in body or not isinstance(body.get("schema"), int):
        raise SchemaError("a message needs a kind and a schema version")
    kind, schema = body.pop("kind"), body.pop("schema")
    if schema > SCHEMA_VERSION:
        raise SchemaError(
            f"a {kind} of schema {schema}; this postroad reads up to schema {SCHEMA_VERSION}: upgrade this service"
        )
    if not isinstance(kind, str) or kind not in _kinds:
        raise SchemaError(f"unknown message kind {kind!r}; known: {sorted(_kinds)}")
    try:
        return _kinds[kind].model_validate(body)
    except ValidationError as error:
        raise SchemaError(f"a {kind} that does not validate: {error}") from error
