"""The logs and the store of a run, whether it lives, has ended or has crashed: everything that only looks uses this."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from postroad.bus import Bus, BusError
from postroad.config import Environment, Recipe, load_recipe
from postroad.store import Store, StoreError
from postroad.supervisor.folder import FolderBusy, FolderError, RunFolder, Urls, choose_ports
from postroad.supervisor.plan import plain_environment, service_environment
from postroad.supervisor.processes import exited, signal_group, start
from postroad.supervisor.servers import listening
from postroad.supervisor.state import StateRecord

LIVE_S = 3.0
OPEN_DEADLINE_S = 60.0
STOP_S = 10.0
RETRY_S = 0.1


class Unreachable(RuntimeError):
    """The servers of a live run do not answer now."""


@dataclass(frozen=True)
class OpenedRun:
    """`live`: a supervisor or containers run it now. `environment` is what its services are told."""

    run: str
    recipe: Recipe
    bus: Bus
    store: Store
    live: bool
    state: StateRecord | None = None
    environment: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def finished(self) -> bool:
        return self.state is not None and self.state.state == "finished"


@asynccontextmanager
async def opened(folder: RunFolder | None) -> AsyncIterator[OpenedRun]:
    """Connect to the run in `folder`, or, without one, to the run that POSTROAD_* describe (in a container). Where no
    supervisor lives, its NATS and Valkey are started for as long as this lasts, and nothing else is. Raises FolderError."""
    if folder is None:
        async with from_environment() as run:
            yield run
        return
    folder.record()
    end = time.monotonic() + OPEN_DEADLINE_S
    while not _hold(folder):
        try:
            async with reached(folder) as run:
                yield run
            return
        except Unreachable as error:  # it is starting or stopping
            if time.monotonic() > end:
                raise FolderError(f"the run in {folder.path} lives, but its NATS or Valkey does not answer") from error
            await asyncio.sleep(RETRY_S)
    async with _temporary(folder) as run:
        yield run


def _hold(folder: RunFolder) -> bool:
    """Hold the folder as a reader; False where a supervisor lives."""
    try:
        folder.acquire("reader")
    except FolderBusy as busy:
        if busy.holder != "supervisor":
            raise
    return folder.is_held


@asynccontextmanager
async def from_environment() -> AsyncIterator[OpenedRun]:
    environment = Environment.read()
    urls = Urls(environment.nats_url, environment.redis_url)
    async with _connected(environment.run, urls, OPEN_DEADLINE_S) as (bus, store):
        yield OpenedRun(environment.run, load_recipe(environment.recipe), bus, store, True, None, dict(os.environ))


@asynccontextmanager
async def reached(folder: RunFolder) -> AsyncIterator[OpenedRun]:
    """The live run in `folder`. Raises Unreachable."""
    record = folder.record()
    urls = folder.urls(record.ports)
    async with _connected(record.run, urls, LIVE_S) as (bus, store):
        environment = service_environment(folder, record, urls)
        yield OpenedRun(record.run, folder.recipe(), bus, store, True, folder.state(), environment)


@asynccontextmanager
async def _temporary(folder: RunFolder) -> AsyncIterator[OpenedRun]:
    record, ports = folder.record(), choose_ports()
    urls = folder.urls(ports)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for server in folder.servers(ports):
            processes.append(start(server.command, plain_environment(), folder.logs / f"{server.name}.log"))
        try:
            await listening([ports.nats, ports.valkey], OPEN_DEADLINE_S)
        except TimeoutError as error:
            raise Unreachable(f"NATS or Valkey did not start; see {folder.logs}") from error
        async with _connected(record.run, urls, OPEN_DEADLINE_S) as (bus, store):
            environment = service_environment(folder, record, urls)
            yield OpenedRun(record.run, folder.recipe(), bus, store, False, folder.state(), environment)
    finally:
        for process in processes:
            await stop(process)
        folder.release()


async def stop(process: subprocess.Popen[bytes], deadline_s: float = STOP_S) -> None:
    """SIGTERM, and SIGKILL at the deadline."""
    ending = asyncio.ensure_future(exited(process))
    signal_group(process, signal.SIGTERM)
    await asyncio.wait({ending}, timeout=deadline_s)
    signal_group(process, signal.SIGKILL)
    await ending


@asynccontextmanager
async def _connected(run: str, urls: Urls, deadline_s: float) -> AsyncIterator[tuple[Bus, Store]]:
    try:
        bus = await Bus.connect(urls.nats, run, deadline_s=deadline_s)
    except BusError as error:
        raise Unreachable(str(error)) from error
    try:
        try:
            store = await Store.connect(urls.redis, run, deadline_s=deadline_s)
        except StoreError as error:
            raise Unreachable(str(error)) from error
        try:
            yield bus, store
        finally:
            await store.close()
    finally:
        await bus.close()
