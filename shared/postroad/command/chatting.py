"""`postroad chat`: talk to the model of a live run through its router, or to what a finished run has made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer

from postroad.command.folders import FAILED, Dir, chosen
from postroad.supervisor.folder import FolderError, RunFolder
from postroad.supervisor.members import read_members
from postroad.supervisor.opened import OpenedRun, from_environment, reached
from postroad.supervisor.serving import served

MODEL = "postroad"  # the router answers to this name whatever the model
CONNECT_S, ANSWER_S = 5.0, 600.0


class ChatError(RuntimeError):
    """The router did not answer as it should; the message is its own."""


@dataclass(frozen=True)
class Router:
    url: str
    key: str = field(repr=False)


def chat(
    dir: Dir = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, print the answer, end.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to the model; an empty line, Ctrl-D or Ctrl-C ends it."""
    settings: dict[str, Any] = {"model": MODEL, "temperature": temperature, "stream": True}
    if max_tokens is not None:
        settings["max_tokens"] = max_tokens
    try:
        asyncio.run(_chat(chosen(dir), message, settings))
    except (ChatError, httpx.HTTPError) as error:
        typer.echo(f"postroad: no answer: {error or repr(error)}", err=True)
        raise typer.Exit(FAILED) from error


async def _chat(folder: RunFolder | None, message: str | None, settings: dict[str, Any]) -> None:
    if folder is None:
        async with from_environment() as run:
            await _talk(await _router(run), message, settings)
    elif folder.live() is not None:
        async with reached(folder) as run:
            await _talk(await _router(run), message, settings)
    else:
        typer.echo("starting an engine with what the run has made …", err=True)
        async with served(folder) as run:
            await _talk(await _router(run), message, settings)


async def _router(run: OpenedRun) -> Router:
    for member in await read_members(run.store):
        if member.kind == "router":
            return Router(member.info["url"], run.environment["POSTROAD_KEY"])
    raise FolderError("the run has no router now: wait until `postroad ps` shows one that is ready")


async def _talk(router: Router, message: str | None, settings: dict[str, Any]) -> None:
    messages: list[dict[str, str]] = []
    async with httpx.AsyncClient(timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S)) as client:
        while said := message or await _ask():
            messages.append({"role": "user", "content": said})
            answer = ""
            async for piece in _answer(client, router, {**settings, "messages": messages}):
                typer.echo(piece, nl=False)
                answer += piece
            typer.echo()
            messages.append({"role": "assistant", "content": answer})
            if message:
                return


async def _ask() -> str:
    try:
        return (await asyncio.to_thread(input, "> ")).strip()
    except EOFError:
        return ""


async def _answer(client: httpx.AsyncClient, router: Router, body: dict[str, Any]) -> AsyncIterator[str]:
    """The answer piece by piece. Raises ChatError."""
    headers = {"Authorization": f"Bearer {router.key}"}
    async with client.stream("POST", f"{router.url}/v1/chat/completions", json=body, headers=headers) as response:
        if response.status_code != httpx.codes.OK:
            raise ChatError(f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:400]}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ChatError(event["error"].get("message", data))
            for choice in event.get("choices", ()):
                yield choice["delta"].get("content") or ""
