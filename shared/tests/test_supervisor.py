"""The supervisor on real servers and stand-in services: it restarts, resumes, refuses, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postroad.supervisor.folder import RunFolder
from postroad.supervisor.state import StateRecord

SUPERVISE = str(Path(__file__).with_name("supervise.py"))
KINDS = ["nats", "valkey", "engine", "router", "reward", "worker", "trainer"]
DEADLINE_S = 60.0


def wait(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Mesh:
    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.supervisors: list[subprocess.Popen[str]] = []

    def up(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, SUPERVISE, str(self.folder.path), *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.supervisors.append(process)
        return process

    def up_and_running(self, *arguments: str) -> subprocess.Popen[str]:
        process = self.up(*arguments)
        wait(lambda: process.poll() is not None or self.state().supervisor == process.pid)
        self.wait_state("running")
        return process

    def state(self) -> StateRecord:
        return self.folder.state() or StateRecord.model_validate({"run": "", "supervisor": 0, "progress": {"steps": 0}})

    def wait_state(self, state: str) -> None:
        wait(lambda: self.state().state == state)

    def pids(self) -> list[int]:
        return [process.pid for process in self.state().processes if process.pid]

    def ever(self) -> list[int]:
        """Every process that a stand-in ever was, and those of now."""
        file = self.folder.path / "pids"
        return [int(line) for line in (file.read_text().split() if file.exists() else ())] + self.pids()

    def finish(self) -> None:
        (self.folder.path / "finish").touch()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path / "run")
    yield mesh
    for process in mesh.supervisors:
        process.kill()
        process.communicate()


def test_a_run_starts_finishes_and_leaves_nothing(mesh):
    supervisor = mesh.up_and_running()
    state = mesh.state()
    assert {process.kind for process in state.processes} == set(KINDS)
    assert all(process.state == "ready" and process.pid for process in state.processes)
    wait(lambda: mesh.state().progress.step == 3)
    everybody = mesh.ever()
    mesh.finish()
    output, _ = supervisor.communicate(timeout=DEADLINE_S)
    assert supervisor.returncode == 0
    assert mesh.state().state == "finished"
    assert mesh.state().progress.staleness_max == 1
    assert output.splitlines()[-1] == "audit: acknowledged 0 trained 0 dead 0 pending 0 lost 0 twice 0"
    assert not [pid for pid in everybody if is_alive(pid)]


def test_secrets_are_for_the_owner_alone_and_nowhere_else(mesh):
    mesh.up_and_running()
    assert mesh.folder.secrets_file.stat().st_mode & 0o777 == 0o600
    secret = mesh.folder.secrets()
    for file in (mesh.folder.run_file, mesh.folder.state_file, *mesh.folder.logs.iterdir()):
        assert not [word for word in (secret.nats, secret.valkey, secret.key) if word in file.read_text()]
    for pid in mesh.pids():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        assert not [word for word in (secret.nats, secret.valkey, secret.key) if word in command]


def test_each_is_restarted_after_kill_9(mesh):
    supervisor = mesh.up_and_running()
    for kind in KINDS:
        before = next(process for process in mesh.state().processes if process.kind == kind)
        os.kill(before.pid, signal.SIGKILL)

        def is_back(kind: str = kind, pid: int | None = before.pid) -> bool:
            now = next(process for process in mesh.state().processes if process.kind == kind)
            return now.pid not in (None, pid) and now.restarts == 1 and now.state == "ready"

        wait(is_back)
        after = next(process for process in mesh.state().processes if process.kind == kind)
        assert after.port == before.port
    mesh.finish()
    assert supervisor.wait(DEADLINE_S) == 0
    assert mesh.state().state == "finished"


def test_nothing_outlives_kill_9_of_the_supervisor_and_the_folder_resumes(mesh):
    supervisor = mesh.up_and_running()
    wait(lambda: mesh.state().progress.step == 3)
    everybody, secrets, ports = mesh.ever(), mesh.folder.secrets(), mesh.folder.record().ports
    assert all(is_alive(pid) for pid in mesh.pids())
    supervisor.kill()
    supervisor.wait()
    wait(lambda: not [pid for pid in everybody if is_alive(pid)], 5.0)
    assert mesh.folder.live() is None
    again = mesh.up_and_running()
    assert (mesh.folder.secrets(), mesh.folder.record().ports) == (secrets, ports)
    wait(lambda: mesh.state().progress.step == 3)
    mesh.finish()
    assert again.wait(DEADLINE_S) == 0


def test_a_second_up_on_a_live_folder_is_refused_with_the_pid(mesh):
    supervisor = mesh.up_and_running()
    second = mesh.up()
    output, _ = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 2
    assert str(supervisor.pid) in output
    assert mesh.state().state == "running"
    assert mesh.folder.live() == supervisor.pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_leaves_nothing(mesh, number):
    supervisor = mesh.up_and_running()
    everybody = mesh.ever()
    started = time.monotonic()
    supervisor.send_signal(number)
    assert supervisor.wait(DEADLINE_S) == 1
    assert time.monotonic() - started < 20
    assert mesh.state().state == "stopped"
    assert not [pid for pid in everybody if is_alive(pid)]


def test_a_signal_while_it_starts_leaves_nothing(mesh):
    supervisor = mesh.up("engine=1")
    wait(lambda: len(mesh.pids()) >= 2)
    supervisor.send_signal(signal.SIGINT)
    supervisor.send_signal(signal.SIGINT)
    supervisor.wait(DEADLINE_S)
    assert mesh.state().state == "stopped"
    assert not [pid for pid in mesh.ever() if is_alive(pid)]


def test_a_fatal_configuration_fails_the_run_at_once_and_says_why(mesh):
    supervisor = mesh.up("trainer=3")
    assert supervisor.wait(DEADLINE_S) == 1
    state = mesh.state()
    assert state.state == "failed"
    assert "trainer-0" in state.reason and "this trainer is broken" in state.reason
    assert not [pid for pid in mesh.ever() if is_alive(pid)]


def test_a_kept_mesh_stays_when_the_run_has_finished(mesh):
    supervisor = mesh.up_and_running("--keep")
    mesh.finish()
    mesh.wait_state("finished")
    alive = {process.kind for process in mesh.state().processes if process.pid and is_alive(process.pid)}
    assert alive == set(KINDS) - {"trainer"}
    supervisor.terminate()
    assert supervisor.wait(DEADLINE_S) == 0
    assert mesh.state().state == "finished"


def test_a_detached_mesh_returns_when_it_is_ready(mesh):
    output, _ = mesh.up("--detach").communicate(timeout=DEADLINE_S)
    assert output.split() == ["running"]
    pid = mesh.folder.live()
    assert pid is not None
    everybody = [pid, *mesh.ever()]
    os.kill(pid, signal.SIGTERM)
    wait(lambda: not [pid for pid in everybody if is_alive(pid)])
    assert mesh.state().state == "stopped"


def test_a_detached_mesh_that_fails_says_why(mesh):
    output, _ = mesh.up("--detach", "router=3").communicate(timeout=DEADLINE_S)
    assert output.startswith("failed") and "this router is broken" in output
