"""Which processes a recipe needs, how they are started, and in which order they stop."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

from postroad.config import Recipe
from postroad.supervisor.folder import RunFolder, RunRecord, Urls
from postroad.supervisor.servers import free_port

Kind = Literal["nats", "valkey", "engine", "router", "reward", "worker", "trainer"]
# the trainer takes longest to open and needs no other service for that: it starts beside the engines
START_ORDER: tuple[tuple[Kind, ...], ...] = (("engine", "trainer"), ("router",), ("reward",), ("worker",))
STOP_ORDER: tuple[Kind, ...] = ("trainer", "worker", "router", "engine", "reward")
SERVERS: tuple[Kind, ...] = ("valkey", "nats")


@dataclass(frozen=True)
class Service:
    """A process to be kept alive. `name` is its POSTROAD_NAME and names its log, `port` its POSTROAD_PORT."""

    kind: Kind
    name: str
    command: tuple[str, ...]
    port: int | None = None


def services(recipe: Recipe) -> list[Service]:
    """The services of the mesh, without its servers. Who learns from given answers needs the trainer alone."""
    trainer = Service("trainer", "trainer", trainer_command(recipe.trainer.processes))
    if recipe.trainer.algorithm.supervised:
        return [trainer]
    python = sys.executable
    port = free_port() if recipe.router.replicas > 1 else None  # replicas listen on one
    engine, worker = engine_command(recipe), (python, "-m", "postroad_rollout.worker")
    return [
        *(Service("engine", f"engine-{number}", (*engine, *role_of(recipe, number)))
          for number in range(recipe.rollout.engines)),
        *(Service("router", f"router-{number}", (python, "-m", "postroad_router"), port)
          for number in range(recipe.router.replicas)),
        Service("reward", "reward-0", (python, "-m", "postroad_reward")),
        *(Service("worker", f"worker-{number}", worker) for number in range(recipe.rollout.workers)),
        trainer,
    ]  # fmt: skip


def role_of(recipe: Recipe, engine: int) -> tuple[str, ...]:
    roles = recipe.rollout.engine.roles
    return ("--role", roles[engine]) if engine < len(roles) else ()


def engine_command(recipe: Recipe) -> tuple[str, ...]:
    section = recipe.rollout.engine
    if section.kind == "embedded":
        return (sys.executable, "-m", "postroad_rollout.engine_service")
    return (section.sglang.python or sys.executable, "-m", "postroad_rollout.sglang")


def trainer_command(processes: int) -> tuple[str, ...]:
    if processes == 1:
        return (sys.executable, "-m", "postroad_trainer")
    return (sys.executable, "-m", "postroad_trainer.launch", str(processes))


def service_environment(folder: RunFolder, record: RunRecord, urls: Urls) -> dict[str, str]:
    """What every service of the run is told (postroad.config.Environment); POSTROAD_NAME comes on top."""
    return {
        **os.environ,
        "POSTROAD_RUN": record.run,
        "POSTROAD_DIR": str(folder.path),
        "POSTROAD_RECIPE": str(folder.recipe_file),
        "POSTROAD_MODEL": record.model,
        "POSTROAD_NATS_URL": urls.nats,
        "POSTROAD_REDIS_URL": urls.redis,
        "POSTROAD_KEY": folder.secrets().key,
        "POSTROAD_HOST": "127.0.0.1",
        "POSTROAD_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def plain_environment() -> dict[str, str]:
    """What the servers need: nothing of ours."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
