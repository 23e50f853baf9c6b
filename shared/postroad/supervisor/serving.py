"""What a finished run has made, served by one engine and one router that live as long as somebody talks to them."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from postroad.store import Store
from postroad.supervisor.child import TAIL_LINES, tail
from postroad.supervisor.folder import FolderError, RunFolder, held
from postroad.supervisor.members import Member, read_members
from postroad.supervisor.opened import OpenedRun, opened, stop
from postroad.supervisor.plan import services
from postroad.supervisor.processes import start
from postroad.weights import Manifest
from postroad.weights.manifest import DOCUMENT

READY_DEADLINE_S = 180.0
POLL_S = 0.2


@asynccontextmanager
async def served(folder: RunFolder) -> AsyncIterator[OpenedRun]:
    """Serve `<folder>/model`, which the trainer writes when a run has finished, in a mesh of its own in a temporary
    folder: the run's logs are not touched. Raises FolderError where there is no such model or it can't be served."""
    model = folder.path / "model"
    if not model.is_dir():
        raise FolderError(f"{folder.path} has no model yet: a run writes it at its end; `postroad up` goes on with it")
    recipe = folder.recipe()
    section = recipe.model.model_copy(update={"path": str(model), "bundled": None})
    engine = recipe.rollout.engine.model_copy(update={"roles": []})
    alone = {
        "rollout": recipe.rollout.model_copy(update={"engines": 1, "engine": engine}),
        "router": recipe.router.model_copy(update={"replicas": 1}),
    }
    recipe = recipe.model_copy(update={"name": "chat", "model": section, **alone})
    async with AsyncExitStack() as stack:
        place = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postroad-chat-"))))
        with held(place, "reader"):
            place.prepare(recipe, model)
        run = await stack.enter_async_context(opened(place))
        for service in services(recipe):
            if service.kind in ("engine", "router"):
                environment = {**run.environment, "POSTROAD_NAME": service.name}
                stack.push_async_callback(stop, start(service.command, environment, place.logs / f"{service.name}.log"))
        await _wait_ready(run.store, place)
        yield run


async def _wait_ready(store: Store, place: RunFolder) -> None:
    """Until the engine serves and the router knows. No trainer publishes here: what the engine has loaded is made the
    published version."""
    end = time.monotonic() + READY_DEADLINE_S
    published = False
    while time.monotonic() < end:
        members = {member.kind: member for member in await read_members(store)}
        engine = members.get("engine")
        if engine is not None and not published:
            await _publish(store, engine)
            published = True
        if engine is not None and engine.info.get("state") == "ready" and "router" in members:
            return
        await asyncio.sleep(POLL_S)
    tails = "\n".join(tail(log, TAIL_LINES // 3) for log in sorted(place.logs.glob("*-0.log")))
    raise FolderError(f"the engine was not ready within {READY_DEADLINE_S:.0f} s:\n{tails}")


async def _publish(store: Store, engine: Member) -> None:
    version = engine.version or 0
    manifest = Manifest(
        run=store.run, version=version, parent=None, digest=engine.info.get("digest") or "", size_bytes=0, tensors=[],
        created=time.time(),
    )  # fmt: skip
    await store.compare_and_set(DOCUMENT, "", str(manifest.stamp), manifest.model_dump(mode="json"))
