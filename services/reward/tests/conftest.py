"""A reward service in the test's own process, or as a process of its own, on a real road."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from postroad.bus import Bus
from postroad.messages import DeadLetter, RewardSpec, Sample, Sampling, Task, Trajectory, VersionSpan
from postroad.store import Store
from postroad_reward.sandbox import Limits, Sandbox, SandboxUnavailable

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib hides the modules beside the tests

HERE = Path(__file__).parent
RUN = "r"


def trajectory(member: int, reward: RewardSpec, response: str = "4", group: str = "g00000000") -> Trajectory:
    task = Task(
        run=RUN, id=group, prompt=[{"role": "user", "content": "2 + 2"}], members=8, sampling=Sampling(), reward=reward,
        row="0", deadline=time.time() + 600,
    )  # fmt: skip
    return Trajectory(
        run=RUN, id=f"{group}.{member}", member=member, task=task, tokens=np.arange(4, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1], dtype=np.uint8), log_probabilities=np.zeros(4, dtype=np.float32),
        versions=[VersionSpan(start=2, end=4, version=0)],
        messages=[*task.prompt, {"role": "assistant", "content": response}], finish_reason="stop",
    )  # fmt: skip


def function(name: str, **metadata: Any) -> RewardSpec:
    return RewardSpec(grader="function", settings={"path": f"example_rewards.{name}"}, label="4", metadata=metadata)


@dataclass
class Road:
    """The test's ends of the road, and what a service needs to know about it."""

    bus: Bus
    store: Store
    folder: Path
    nats_url: str
    redis_url: str

    trajectory = staticmethod(trajectory)
    function = staticmethod(function)

    async def send(self, *trajectories: Trajectory) -> None:
        for sent in trajectories:
            await self.bus.publish(self.bus.subjects.trajectory(sent.group, sent.member), sent)

    async def samples(self) -> list[Sample]:
        return [entry.message async for entry in self.bus.replay("SAMPLES")]

    async def letters(self) -> list[DeadLetter]:
        return [entry.message async for entry in self.bus.replay("DEAD")]

    def recipe(self, tools: Sequence[dict[str, Any]] = (), **reward: Any) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({
            "name": "test", "model": {"bundled": "tiny-llama"},
            "data": {"kind": "class", "path": "a.b"}, "trainer": {"steps": 1},
            "tools": list(tools), "reward": {"grader": "exact", "concurrency": 4, **reward},
        }))  # fmt: skip
        return path

    def environment(self, recipe: Path) -> dict[str, str]:
        return {
            **os.environ, "POSTROAD_RUN": RUN, "POSTROAD_DIR": str(self.folder), "POSTROAD_RECIPE": str(recipe),
            "POSTROAD_MODEL": str(self.folder), "POSTROAD_NATS_URL": self.nats_url, "POSTROAD_REDIS_URL": self.redis_url,
            "POSTROAD_KEY": "key", "PYTHONPATH": str(HERE),
        }  # fmt: skip

    def start_process(self, recipe: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "postroad_reward"], env=self.environment(recipe), text=True,
            stderr=(self.folder / "reward.log").open("a"),
        )  # fmt: skip


@pytest.fixture
async def road(nats, valkey, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(str(HERE))
    bus, store = await Bus.connect(nats.url, RUN), await Store.connect(valkey.url, RUN)
    await bus.create_streams()
    yield Road(bus, store, tmp_path, nats.url, valkey.url)
    await store.close()
    await bus.close()


@pytest.fixture
def gone() -> Callable[[int], bool]:
    def check(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    return check


@pytest.fixture(scope="session")
def started_sandbox():
    """A function that starts sandboxes with tight limits; the test is skipped where this machine can't run one."""

    async def start(**keywords: Any) -> Sandbox:
        limits = Limits(memory_bytes=384 << 20, disk_bytes=8 << 20, output_bytes=64 << 10, processes=16)
        sandbox = Sandbox(limits, **keywords)
        try:
            await sandbox.start()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        return sandbox

    return start


@pytest.fixture
async def sandbox(started_sandbox):
    sandbox = await started_sandbox(size=2)
    yield sandbox
    await sandbox.close()
