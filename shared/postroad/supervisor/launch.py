"""`postroad up` from a recipe to a supervised mesh, in the foreground or detached."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from postroad.config import Recipe
from postroad.supervisor.checks import check_disk, check_model, check_modules, check_servers, model_folder
from postroad.supervisor.folder import RunFolder
from postroad.supervisor.plan import Service, services
from postroad.supervisor.state import RunState, StateRecord
from postroad.supervisor.supervisor import Options, Supervisor
from postroad.supervisor.view import View

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclass(frozen=True)
class Launch:
    """A recipe to be run in a folder. `plan` gives the services; tests give their own."""

    folder: RunFolder
    recipe: Recipe
    keep: bool = False
    plan: Callable[[Recipe], Sequence[Service]] = services

    def check(self) -> None:
        """Refuse what can't run. Raises Refused or MissingServer; the model may still have to be made."""
        check_disk(self.folder.path)
        check_servers()
        check_modules()
        if self.recipe.model.bundled is None:
            check_model(model_folder(self.recipe))

    def prepare(self) -> None:
        """Write the folder's files; it must be held. Raises FolderError where it belongs to another recipe."""
        self.folder.prepare(self.recipe, model_folder(self.recipe))

    def run(self, view: View) -> RunState:
        """Supervise to the end, in this process, after `prepare`."""
        self.folder.sign("supervisor")
        record = self.folder.record().model_copy(update={"supervisor": os.getpid()})
        self.folder.write_record(record)
        supervisor = Supervisor(self.folder, record, self.recipe, self.plan(self.recipe), Options(self.keep, view))
        return asyncio.run(supervisor.run())


class _Announcing(View):
    """Tells the command that started a detached mesh when it may return."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def changed(self, state: StateRecord) -> None:
        if self._descriptor is not None and state.state != "starting":
            os.write(self._descriptor, json.dumps({"state": state.state, "reason": state.reason}).encode())
            os.close(self._descriptor)
            self._descriptor = None


def detach(launch: Launch) -> tuple[str, str]:
    """Run the mesh in a process of its own and wait until it is ready or over; (state, reason) of then.

    The folder must be held and prepared; after this the detached process holds it."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        os.setsid()
        if os.fork() == 0:
            _become_daemon(launch, writing)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    launch.folder.release()
    with os.fdopen(reading) as answers:
        text = answers.read()
    if not text:
        return "failed", f"the supervisor ended early; {launch.folder.logs / 'supervisor.log'} says why"
    answer = json.loads(text)
    return answer["state"], answer["reason"]


def _become_daemon(launch: Launch, writing: int) -> None:
    """Never returns."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(launch.folder.logs / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, descriptor in enumerate((null, log, log)):
            os.dup2(descriptor, number)
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr, force=True)
        code = 0 if launch.run(_Announcing(writing)) in ("finished", "stopped") else 1
    except Exception:
        logger.exception("the supervisor failed")
    finally:
        os._exit(code)
