"""The routes of sessions and keys."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import msgpack
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from postroad.messages import SchemaError, Task, decode, encode
from postroad_router.access import Caller, check_session_name
from postroad_router.bodies import read_body, read_msgpack
from postroad_router.documents import told
from postroad_router.errors import ApiError
from postroad_router.openai_types import validated
from postroad_router.parts import Parts
from postroad_router.sessions.tree import leaves

routes = APIRouter()


class NewSession(BaseModel):
    session: str | None = Field(None, description="Its name; one is made up where there is none.")
    version: int | None = Field(
        None, ge=0, lt=2**31, description="The only weight version that its turns may come from."
    )


class Collection(BaseModel):
    """In msgpack. `task` is the encoded message; `keep`: the newest end of the tree, every end that was not tried again,
    or all ends."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    task: bytes
    member: int = Field(ge=0)
    keep: Literal["latest", "branches", "all"] = "branches"


class NewKey(BaseModel):
    name: str = Field(min_length=1, max_length=128, description="By which it is withdrawn.")
    scope: Literal["agent", "worker", "admin"]
    session: str = Field("", description="The only session that it may use.")
    ttl_s: Annotated[float, Field(gt=0, le=3.2e8)] = 30 * 86_400.0


@routes.post("/sessions", openapi_extra=told(NewSession))
async def create_session(request: Request) -> dict[str, Any]:
    parts, caller = _known(request)
    asked = validated(NewSession, await read_body(request))
    name = asked.session or caller.session or uuid.uuid4().hex
    check_session_name(name)
    if not await parts.sessions.create(name, caller.identity.name, asked.version):
        raise ApiError(409, f"there is a session {name} already", param="session", code="session_exists")
    return {"session_id": name, "base_url": str(request.base_url.replace(path=f"/sessions/{name}/v1"))}


@routes.get("/sessions/{name}")
async def read_session(request: Request, name: str) -> dict[str, Any]:
    """The tree of turns."""
    parts = await _allowed(request, name)
    about = await parts.sessions.about(name)
    turns = await parts.sessions.turns(name, range(about.turns))
    listed = []
    for turn in turns.values():
        record = await parts.sessions.record(name, turn.number, experts=False)
        listed.append({
            "turn": turn.number, "parent": turn.parent if turn.parent >= 0 else None, "messages": record.messages,
            "follows": turn.follows if turn.follows >= 0 else None, "finish_reason": turn.finish, "engine": record.engine,
            "prompt_tokens": turn.kept + len(turn.prompt), "completion_tokens": len(turn.tokens),
            "versions": [list(span) for span in record.versions], "started": turn.started, "seconds": turn.ended - turn.started,
        })  # fmt: skip
    return {
        "session_id": name, "created": about.created, "size_bytes": about.size_bytes, "version": about.version,
        "turns": listed, "ends": [turn.number for turn in leaves(turns, "all")],
    }  # fmt: skip


@routes.delete("/sessions/{name}", status_code=204)
async def delete_session(request: Request, name: str) -> Response:
    parts = await _allowed(request, name)
    await parts.sessions.delete(name)
    return Response(status_code=204)


@routes.post("/sessions/{name}/trajectories", openapi_extra=told(Collection, kind="application/msgpack"))
async def collect(request: Request, name: str) -> Response:
    """Trajectories as encoded messages, in a msgpack list."""
    parts = await _allowed(request, name)
    asked = validated(Collection, await read_msgpack(request))
    try:
        task = decode(asked.task)
    except SchemaError as error:
        raise ApiError(400, f"task: {error}", param="task", code="invalid_value") from error
    if not isinstance(task, Task):
        raise ApiError(400, f"task is a {task.kind}", param="task", code="invalid_value")
    found = await parts.collector.trajectories(name, asked.keep, task, asked.member)
    return Response(msgpack.packb([encode(trajectory) for trajectory in found]), media_type="application/msgpack")


@routes.post("/keys", openapi_extra=told(NewKey))
async def create_key(request: Request) -> dict[str, str]:
    parts, _ = _known(request)
    asked = validated(NewKey, await read_body(request))
    if asked.session:
        check_session_name(asked.session)
    return {"name": asked.name, "key": await parts.keys.create(asked.name, asked.scope, asked.session, asked.ttl_s)}


@routes.delete("/keys/{name}")
async def delete_key(request: Request, name: str) -> dict[str, int]:
    parts, _ = _known(request)
    return {"withdrawn": await parts.keys.delete(name)}


def _known(request: Request) -> tuple[Parts, Caller]:
    return request.app.state.parts, request.state.caller


async def _allowed(request: Request, name: str) -> Parts:
    """Raises ApiError where there is no such session, or it is somebody else's."""
    parts, caller = _known(request)
    check_session_name(name)
    about = await parts.sessions.about(name)
    if not about.owner:
        raise ApiError(404, f"there is no session {name}; it begins with its first turn", code="session_not_found")
    about.check(name, caller.identity)
    if caller.identity.session not in ("", name):
        raise ApiError(403, f"this key is for session {caller.identity.session} alone", code="foreign_session")
    return parts
