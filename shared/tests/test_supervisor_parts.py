"""The supervisor's decisions: restarts, states, folders, refusals."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from postroad.config import Recipe
from postroad.supervisor import checks, restarts
from postroad.supervisor.checks import Refused, check_disk, check_model, check_modules
from postroad.supervisor.child import Child
from postroad.supervisor.folder import FolderBusy, FolderError, Ports, RunFolder, choose_ports, held, newest_run
from postroad.supervisor.members import Member, of_process
from postroad.supervisor.plan import Service, services
from postroad.supervisor.restarts import Restarts
from postroad.supervisor.servers import free_port
from postroad.supervisor.state import MOVES, IllegalMove, Progress, StateRecord

RECIPE = {
    "name": "test", "model": {"bundled": "tiny-llama"}, "data": {"kind": "class", "path": "a.b"},
    "reward": {"grader": "exact"}, "trainer": {"steps": 3},
}  # fmt: skip


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate(RECIPE | sections)


def test_delays_double_and_start_over_after_a_good_life():
    policy = Restarts()
    assert [policy.after(1.0, 100.0 * n) for n in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert policy.after(30.0, 1000.0) == 0.2
    assert policy.count == 8


@pytest.mark.parametrize(("every_s", "failures"), [(1.0, 10), (6.0, 10), (7.0, 30), (100.0, 30)])
def test_ten_failures_within_a_minute_or_thirty_in_a_row_are_given_up(every_s, failures):
    policy = Restarts()
    delays = [policy.after(1.0, every_s * number) for number in range(failures)]
    assert None not in delays[:-1] and delays[-1] is None


def test_what_ends_again_and_again_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "LONGEST_DELAY_S", 0.01)
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.01)
    seen: list[str] = []
    service = Service("worker", "worker-0", ("/bin/sh", "-c", "echo broken; exit 7"))
    child = Child(service, dict(os.environ), tmp_path, lambda one: seen.append(one.record.state))
    assert asyncio.run(child.keep()) == ("given_up", 7)
    assert child.record.restarts == restarts.FAILURES - 1
    assert child.tail().splitlines() == ["broken"] * restarts.FAILURES
    assert seen[:4] == ["starting", "stopped", "backoff", "starting"]


@pytest.mark.parametrize(("command", "kind", "end"), [
    ("exit 0", "trainer", ("done", 0)), ("exit 3", "trainer", ("fatal", 3)), ("exit 3", "engine", ("fatal", 3)),
])  # fmt: skip
def test_what_an_exit_code_means(tmp_path, command, kind, end):
    child = Child(Service(kind, "one", ("/bin/sh", "-c", command)), dict(os.environ), tmp_path, lambda _: None)
    assert asyncio.run(child.keep()) == end


def test_illegal_moves_raise():
    for state, targets in MOVES.items():
        for target in MOVES:
            record = StateRecord(run="r", supervisor=1, state=state, progress=Progress(steps=1))
            if target in targets:
                record.move(target)
                assert record.state == target
            else:
                with pytest.raises(IllegalMove, match=f"{state} can't become {target}"):
                    record.move(target)


def test_a_folder_is_prepared_and_resumed_with_the_same_secrets(tmp_path):
    with held(RunFolder(tmp_path / "run"), "supervisor") as folder:
        first = folder.prepare(recipe(), Path("/model"))
        secrets = folder.secrets()
        again = folder.prepare(recipe(trainer={"steps": 9}), Path("/model"))
        assert (again.ports, folder.secrets()) == (first.ports, secrets)
        assert folder.recipe().trainer.steps == 9
        assert len({secrets.nats, secrets.valkey, secrets.key}) == 3


def test_another_recipe_is_refused_and_the_difference_shown(tmp_path):
    with held(RunFolder(tmp_path / "run"), "supervisor") as folder:
        folder.prepare(recipe(), Path("/model"))
        with pytest.raises(FolderError, match=r"seed: 0 → 5(.|\n)*trainer.learning_rate: 1.0e-06 → 0.1"):
            folder.prepare(recipe(seed=5, trainer={"steps": 9, "learning_rate": 0.1}), Path("/model"))
        assert folder.recipe() == recipe()


def test_a_port_that_is_taken_is_not_used_again():
    import socket

    earlier = Ports(nats=free_port(), valkey=free_port())
    assert choose_ports(earlier) == earlier
    with socket.create_server(("127.0.0.1", earlier.nats)):
        assert choose_ports(earlier).nats != earlier.nats


def test_one_holder_at_a_time(tmp_path):
    mine, other = RunFolder(tmp_path), RunFolder(tmp_path)
    assert mine.live() is None
    with held(mine, "supervisor"):
        assert other.live() == os.getpid()
        with pytest.raises(FolderBusy, match=f"process {os.getpid()} .a run is live there"):
            other.acquire("supervisor")
    with held(mine, "reader"):
        assert other.live() is None
        with pytest.raises(FolderBusy, match="a command reads it"):
            other.acquire("supervisor", deadline_s=0.1)
    with held(other, "supervisor"):
        assert mine.live() == os.getpid()


def test_the_newest_run_is_found(tmp_path):
    with pytest.raises(FolderError, match="there is no run under"):
        newest_run(tmp_path)
    for number, name in enumerate(("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
        os.utime(tmp_path / name / "run.json", (number, number))
    assert newest_run(tmp_path).path == tmp_path / "a"


@pytest.mark.parametrize(("free", "total"), [(1 << 30, 100 << 30), (20 << 30, 1000 << 30)])
def test_a_disk_nearly_full_is_refused(tmp_path, monkeypatch, free, total):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(total, total - free, free))
    with pytest.raises(Refused, match="GiB free of"):
        check_disk(tmp_path / "not" / "yet")


def test_a_model_folder_is_looked_at(tmp_path):
    with pytest.raises(Refused, match="there is no model folder"):
        check_model(tmp_path / "none")
    with pytest.raises(Refused, match=r"no config\.json"):
        check_model(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(Refused, match="no tokenizer"):
        check_model(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    check_model(tmp_path)


def test_what_is_not_installed_is_named():
    with pytest.raises(Refused, match="not installed in .*: no_such_module"):
        check_modules(["json", "no_such_module"])


def test_a_bundled_model_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Refused, match="the bundled model tiny-llama could not be made"):
        checks.make_bundled_model("tiny-llama", tmp_path / "models" / "tiny-llama")


def test_the_plan_of_a_recipe():
    planned = services(recipe(rollout={"engines": 2, "workers": 2}, trainer={"steps": 1, "processes": 2}))
    names = [service.name for service in planned]
    assert names == ["engine-0", "engine-1", "router-0", "reward-0", "worker-0", "worker-1", "trainer"]
    assert planned[0].command == (sys.executable, "-m", "postroad_rollout.engine_service")
    assert planned[-1].command[1:] == ("-m", "postroad_trainer.launch", "2")
    assert services(recipe())[-1].command == (sys.executable, "-m", "postroad_trainer")


def test_a_member_is_its_process_or_a_child_of_it():
    me = Member("trainer", "trainer", os.getpid(), None, 3, {})
    assert of_process([me], os.getpid()) is me
    assert of_process([me], os.getppid()) is me
    assert of_process([me], 2**22 + 1) is None
