"""The life of an embedded mesh: servers → services → running → (finished | failed | stopped) → nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from postroad.audit import read_audit
from postroad.bus import Bus, BusError, LoggedMessage
from postroad.config import Recipe
from postroad.messages import Step
from postroad.store import Store, StoreError
from postroad.supervisor.child import Child, End
from postroad.supervisor.folder import RunFolder, RunRecord
from postroad.supervisor.members import Member, of_process, read_members
from postroad.supervisor.plan import (
    SERVERS,
    START_ORDER,
    STOP_ORDER,
    Kind,
    Service,
    plain_environment,
    service_environment,
)
from postroad.supervisor.servers import listening, listens
from postroad.supervisor.state import Progress, RunState, StateRecord
from postroad.supervisor.view import View

logger = logging.getLogger(__name__)

SERVER_DEADLINE_S = 20.0
READY_DEADLINE_S = 30.0
STARTING_POLL_S = 0.3
RUNNING_POLL_S = 2.5
READ_S = 10.0
RETRY_S = 1.0
KIND_DRAIN_S = 2.0
DRAIN_S = 10.0
SERVERS_DRAIN_S = 5.0
KILLED_S = 5.0
CANCEL_S = 5.0
SUMMARY_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Options:
    """`keep`: servers and services stay after the run has finished, until they are told to stop."""

    keep: bool = False
    view: View = field(default_factory=View)


@dataclass(frozen=True)
class Ended:
    """A child that won't be started again."""

    child: Child
    end: End
    code: int

    @property
    def reason(self) -> str:
        name, code = self.child.service.name, self.code
        what = (
            f"{name} can't go on as it is configured (exit code {code})"
            if self.end == "fatal"
            else f"{name} failed again and again (last exit code {code})"
        )
        return f"{what}; the end of {self.child.log}:\n{self.child.tail()}"


class Supervisor:
    """Runs one mesh in `folder`, which the caller holds. To be run from the main thread."""

    def __init__(
        self, folder: RunFolder, record: RunRecord, recipe: Recipe, services: Sequence[Service], options: Options
    ) -> None:
        self.folder, self.record, self.recipe, self.options = folder, record, recipe, options
        self.state = StateRecord(
            run=record.run, supervisor=record.supervisor, progress=Progress(steps=recipe.trainer.steps)
        )
        self._services = services
        self._children: dict[Child, asyncio.Task[None]] = {}
        self._ended: asyncio.Queue[Ended] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._told_to_stop = asyncio.Event()
        self._in_a_hurry = False
        self._next_step = 1  # sequence in STEPS

    async def run(self) -> RunState:
        """Supervise until the run is over and nothing of it runs any more; how it ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled)
        self._tell()
        end: tuple[RunState, str] = ("failed", "the supervisor itself failed; its output says why")
        try:
            end = await self._until_told(asyncio.ensure_future(self._live()))
        except (BusError, StoreError, RedisError, OSError, TimeoutError) as error:
            end = ("failed", self._blame_servers(error))
        finally:
            await self._stop(STOP_ORDER, DRAIN_S)
            await self._stop(SERVERS, SERVERS_DRAIN_S)
            if not self.state.over:
                self.state.move(*end)
            self._tell()
        if not (self.options.keep and self.state.state == "finished"):  # said already
            self.options.view.ended(self.state)
        return self.state.state

    def _signalled(self) -> None:
        """The first signal drains, the second one kills."""
        if self._told_to_stop.is_set():
            self._in_a_hurry = True
            for child in self._children:
                child.stop(signal.SIGKILL)
        self._told_to_stop.set()

    async def _until_told(self, living: asyncio.Task[tuple[RunState, str]]) -> tuple[RunState, str]:
        stopping = asyncio.ensure_future(self._told_to_stop.wait())
        await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if living.done():
            return living.result()
        living.cancel()
        await asyncio.wait({living}, timeout=CANCEL_S)
        return "stopped", "it was told to stop; `postroad up` with the same folder goes on"

    def _blame_servers(self, error: Exception) -> str:
        tails = [f"{c.service.name}: {c.tail()}" for c in self._children if c.service.kind in SERVERS]
        return "\n".join([str(error) or repr(error), *tails])

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────
    async def _live(self) -> tuple[RunState, str]:
        """From the servers' start to the run's end by itself."""
        nats, valkey = self.folder.servers(self.record.ports)
        self._keep(Service("nats", nats.name, tuple(nats.command), nats.port), plain_environment())
        self._keep(Service("valkey", valkey.name, tuple(valkey.command), valkey.port), plain_environment())
        await listening([nats.port, valkey.port], SERVER_DEADLINE_S)
        bus = await Bus.connect(nats.url, self.record.run, deadline_s=SERVER_DEADLINE_S)
        try:
            store = await Store.connect(valkey.url, self.record.run, deadline_s=SERVER_DEADLINE_S)
            try:
                await bus.create_streams()
                environment = service_environment(self.folder, self.record, self.folder.urls(self.record.ports))
                ended = await self._supervise(bus, store, environment)
                if ended.end != "done":
                    return "failed", ended.reason
                await self._finish(bus, store)
            finally:
                await store.close()
        finally:
            await bus.close()
        return "finished", ""

    async def _supervise(self, bus: Bus, store: Store, environment: Mapping[str, str]) -> Ended:
        """Until a child ends for good: the trainer because the run is finished, another one because it can't go on."""
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(self._start_services(environment)),
                group.create_task(self._watch_members(store)),
                group.create_task(self._follow_steps(bus)),
                group.create_task(self.options.view.run()),
            ]
            ended = await self._ended.get()
            for task in background:
                task.cancel()
        return ended

    async def _start_services(self, environment: Mapping[str, str]) -> None:
        """Each kind when the one before it is ready. One that takes long doesn't hold up the others for ever."""
        for kinds in START_ORDER:
            wave = [self._keep(service, environment) for service in self._services if service.kind in kinds]
            try:
                road = [child for child in wave if child.service.kind != "trainer"]
                await asyncio.wait_for(self._wait_ready(road), READY_DEADLINE_S)
            except TimeoutError:
                logger.warning("%s not ready after %.0f s; starting the rest", "/".join(kinds), READY_DEADLINE_S)
        await self._wait_ready(self._children)
        self.state.move("running")
        self._tell()

    async def _wait_ready(self, children: Collection[Child]) -> None:
        while not self._are_ready(children):
            self._changed.clear()
            await self._changed.wait()

    def _are_ready(self, children: Collection[Child]) -> bool:
        return all(child.record.state == "ready" for child in children)

    async def _watch_members(self, store: Store) -> None:
        """Who is ready, and which weights it has: a service says so in the store, a server by listening."""
        while True:
            for child in self._children:
                port = child.service.port
                server = child.service.kind in SERVERS
                if server and child.record.state == "starting" and port is not None and await listens(port):
                    child.ready(port, None)
            members: list[Member] = []
            try:
                async with asyncio.timeout(READ_S):
                    members = await read_members(store)
                    await self._read_evaluations(store)
            except (TimeoutError, RedisError, StoreError) as error:
                logger.info("the store can't be read now: %r", error)
            for child in self._children:
                pid = child.record.pid
                if pid is not None and (member := of_process(members, pid)) is not None:
                    child.ready(member.port, member.version)
            settled = self.state.state == "running" and self._are_ready(self._children)
            await asyncio.sleep(RUNNING_POLL_S if settled else STARTING_POLL_S)

    async def _follow_steps(self, bus: Bus) -> None:
        while True:
            try:
                await self._read_steps(bus, follow=True)
            except BusError as error:
                logger.warning("the step log can't be followed now: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _read_steps(self, bus: Bus, *, follow: bool) -> None:
        async for entry in bus.replay("STEPS", start=self._next_step, follow=follow):
            if isinstance(entry, LoggedMessage) and isinstance(entry.message, Step):
                self._next_step = entry.sequence + 1
                self._stepped(entry.message)

    def _stepped(self, step: Step) -> None:
        self.state.progress.add(step)
        self._tell()
        self.options.view.step(step, self.state)

    async def _read_evaluations(self, store: Store) -> None:
        for evaluation in self.recipe.evaluation:
            self.state.evaluations[evaluation.name] = await store.get(f"evaluation:{evaluation.name}") or {}

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────
    async def _finish(self, bus: Bus, store: Store) -> None:
        """Nothing may write any more while the books are closed, unless the mesh is to be kept."""
        if not self.options.keep:
            await self._stop(STOP_ORDER, DRAIN_S)
        async with asyncio.timeout(SUMMARY_DEADLINE_S):
            await self._read_evaluations(store)
            self.state.audit = await read_audit(bus, staleness=self.recipe.trainer.staleness, finished=True)
            await self._read_steps(bus, follow=False)
        if self.options.keep:
            self.state.move("finished")
            self._tell()
            self.options.view.ended(self.state)
            await self._told_to_stop.wait()

    # ── children ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _keep(self, service: Service, environment: Mapping[str, str]) -> Child:
        child = Child(service, environment, self.folder.logs, self._child_changed)
        self._children[child] = asyncio.create_task(self._keep_child(child))
        return child

    async def _keep_child(self, child: Child) -> None:
        end, code = await child.keep()
        if end != "stopped":
            self._ended.put_nowait(Ended(child, end, code))

    def _child_changed(self, child: Child) -> None:
        self._changed.set()
        self._tell()

    async def _stop(self, kinds: Sequence[Kind], deadline_s: float) -> None:
        """SIGTERM kind after kind, and SIGKILL to what is left at the deadline."""
        end = time.monotonic() + deadline_s
        for kind in kinds:
            chosen = [child for child in self._children if child.service.kind == kind]
            for child in chosen:
                child.stop(signal.SIGKILL if self._in_a_hurry else signal.SIGTERM)
            await self._wait_gone(chosen, min(KIND_DRAIN_S, end - time.monotonic()))
        left = [child for child in self._children if child.service.kind in kinds]
        await self._wait_gone(left, end - time.monotonic())
        for child in left:
            if child.alive:
                logger.warning("%s did not stop within %.0f s: killed", child.service.name, deadline_s)
                child.stop(signal.SIGKILL)
        await self._wait_gone(left, KILLED_S)

    async def _wait_gone(self, children: Sequence[Child], timeout_s: float) -> None:
        if tasks := [self._children[child] for child in children]:
            await asyncio.wait(tasks, timeout=max(timeout_s, 0))

    def _tell(self) -> None:
        self.state.processes = [child.record for child in self._children]
        self.folder.write_state(self.state)
        self.options.view.changed(self.state)
