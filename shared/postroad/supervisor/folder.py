"""A run's folder: what is in it, who holds it, and whether a recipe may resume it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field

from postroad.config import Recipe, load_recipe, resolved_yaml
from postroad.supervisor.servers import Server, free_port, nats_server, nats_url, valkey_server, valkey_url
from postroad.supervisor.state import StateRecord, read_state, write_atomically

READER_DEADLINE_S = 60.0
LOCK_RETRY_S = 0.05
MAY_CHANGE = ("trainer.steps", "evaluation")

Holder = Literal["supervisor", "reader"]


class FolderError(RuntimeError):
    """The folder can't be used like this; the message says what to do."""


class FolderBusy(FolderError):
    """Another process holds the folder."""

    def __init__(self, folder: Path, holder: str, pid: int) -> None:
        what = "a run is live there" if holder == "supervisor" else "a command reads it"
        super().__init__(f"{folder} is held by process {pid} ({what}); `postroad down --dir {folder}` ends a run")
        self.holder, self.pid = holder, pid


class Ports(BaseModel):
    nats: int
    valkey: int


@dataclass(frozen=True)
class Urls:
    """Where NATS and Valkey answer, with their credentials."""

    nats: str = field(repr=False)
    redis: str = field(repr=False)


class RunRecord(BaseModel):
    """The whole of run.json. No secrets."""

    run: str
    supervisor: int
    started: float
    ports: Ports
    model: str = ""


class Secrets(BaseModel):
    """The whole of secrets.json, which only its owner may read."""

    nats: str = Field(default_factory=lambda: secrets.token_hex(16), repr=False)
    valkey: str = Field(default_factory=lambda: secrets.token_hex(16), repr=False)
    key: str = Field(default_factory=lambda: secrets.token_hex(16), repr=False)


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.recipe_file = self.path / "recipe.yaml"
        self.run_file = self.path / "run.json"
        self.state_file = self.path / "state.json"
        self.secrets_file = self.path / "secrets.json"
        self.logs = self.path / "logs"
        self._lock: int | None = None

    # ── who holds it ─────────────────────────────────────────────────────────────────────────────────────────────
    def acquire(self, holder: Holder, *, deadline_s: float = READER_DEADLINE_S) -> None:
        """Hold the folder until `release` or the end of the process. Waits for a reader; raises FolderBusy at once
        where a supervisor has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                other, pid = self._holder(descriptor)
                if other == "supervisor" or time.monotonic() > end:
                    os.close(descriptor)
                    raise FolderBusy(self.path, other, pid) from None
                time.sleep(LOCK_RETRY_S)
        self._lock = descriptor
        self.sign(holder)

    @property
    def is_held(self) -> bool:
        """By this process."""
        return self._lock is not None

    def sign(self, holder: Holder) -> None:
        """Say who holds the lock: this process."""
        if self._lock is None:
            raise RuntimeError("the folder is not held")
        os.pwrite(self._lock, f"{holder} {os.getpid()}".encode().ljust(40), 0)

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _holder(self, descriptor: int) -> tuple[str, int]:
        words = os.pread(descriptor, 40, 0).decode().split()
        return (words[0], int(words[1])) if len(words) == 2 else ("reader", 0)  # it has not signed yet

    def live(self) -> int | None:
        """The pid of the supervisor that holds the folder now, or None."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, pid = self._holder(descriptor)
            return pid if holder == "supervisor" else None
        finally:
            os.close(descriptor)
        return None

    # ── what is in it ────────────────────────────────────────────────────────────────────────────────────────────
    def exists(self) -> bool:
        return self.run_file.exists() and self.secrets_file.exists() and self.recipe_file.exists()

    def recipe(self) -> Recipe:
        return load_recipe(self.recipe_file)

    def record(self) -> RunRecord:
        try:
            return RunRecord.model_validate_json(self.run_file.read_text())
        except FileNotFoundError as error:
            raise FolderError(f"there is no run in {self.path}: `postroad up RECIPE --dir {self.path}`") from error

    def state(self) -> StateRecord | None:
        return read_state(self.state_file)

    def secrets(self) -> Secrets:
        return Secrets.model_validate_json(self.secrets_file.read_text())

    def servers(self, ports: Ports) -> tuple[Server, Server]:
        """nats-server and Valkey of this run on `ports`, with their configuration written."""
        secret = self.secrets()
        return (
            nats_server(self.path / "nats", ports.nats, secret.nats),
            valkey_server(self.path / "valkey", ports.valkey, secret.valkey),
        )

    def urls(self, ports: Ports) -> Urls:
        secret = self.secrets()
        return Urls(nats_url(ports.nats, secret.nats), valkey_url(ports.valkey, secret.valkey))

    def prepare(self, recipe: Recipe, model: Path) -> RunRecord:
        """Write what a start or a resume needs. Raises FolderError where the folder belongs to another recipe."""
        earlier: Ports | None = None
        if self.exists():
            earlier = self.record().ports
            refuse_changes(self.recipe(), recipe, self.path)
        else:
            write_atomically(self.secrets_file, Secrets().model_dump_json(), 0o600)
        self.logs.mkdir(exist_ok=True)
        write_atomically(self.recipe_file, resolved_yaml(recipe))
        record = RunRecord(
            run=recipe.name, supervisor=os.getpid(), started=time.time(), ports=choose_ports(earlier), model=str(model)
        )
        self.write_record(record)
        return record

    def write_record(self, record: RunRecord) -> None:
        write_atomically(self.run_file, record.model_dump_json(indent=2))

    def write_state(self, state: StateRecord) -> None:
        write_atomically(self.state_file, state.model_dump_json(indent=2))


@contextmanager
def held(folder: RunFolder, holder: Holder) -> Iterator[RunFolder]:
    folder.acquire(holder)
    try:
        yield folder
    finally:
        folder.release()


def choose_ports(earlier: Ports | None = None) -> Ports:
    """The ports of before where they are free, else new ones."""
    if earlier is not None and is_free(earlier.nats) and is_free(earlier.valkey):
        return earlier
    return Ports(nats=free_port(), valkey=free_port())


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def refuse_changes(before: Recipe, after: Recipe, folder: Path) -> None:
    """A run goes on only with the recipe that it began with. Raises FolderError that shows the difference."""
    old, new = flatten(before.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    changed = [
        f"  {key}: {yaml_text(old.get(key))} → {yaml_text(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise FolderError(
            f"{folder} holds a run of another recipe; only trainer.steps and evaluation may change:\n"
            + "\n".join(changed)
            + "\nuse the old values, or another --dir"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def yaml_text(value: Any) -> str:
    return (
        json.dumps(value)
        if value is None or isinstance(value, (list, dict))
        else str(yaml.safe_dump(value)).split("\n")[0]
    )


def newest_run(parent: Path = Path("runs")) -> RunFolder:
    """The run under `parent` that was started last. Raises FolderError where there is none."""
    runs = [file.parent for file in parent.glob("*/run.json")]
    if not runs:
        raise FolderError(
            f"there is no run under {parent.resolve()}: name one with --dir, or start one with `postroad up`"
        )
    return RunFolder(max(runs, key=lambda path: (path / "run.json").stat().st_mtime))
