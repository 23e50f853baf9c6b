"""One process per trainer rank (launch). Rank 0 speaks with the road; the others do what it says.

Commands travel as msgpack bytes in a torch.distributed broadcast: nothing is pickled. All torch work of a rank runs
on one thread, in the order of the commands.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import torch

from postroad.config import Recipe
from postroad.messages import Sample, decode, encode
from postroad.weights import Snapshot
from postroad_trainer.backend import enter_thread
from postroad_trainer.backend.parallel import world_size
from postroad_trainer.training import Training

_Result = TypeVar("_Result")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class TorchThread:
    """The only thread of this process that touches torch."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=enter_thread)

    async def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def close(self) -> None:
        """Wait for what runs: an interpreter that ends under a running torch thread is aborted."""
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)


class Leader:
    """Rank 0's hold on all ranks."""

    def __init__(self, thread: TorchThread, recipe: Recipe, model: Path) -> None:
        self._thread, self._recipe, self._model = thread, recipe, model
        self._training: Training | None = None

    async def open(self) -> None:
        self._training = await self._thread.run(Training, self._recipe, self._model)

    async def step(self, groups: Sequence[Sequence[Sample]], version: int) -> tuple[dict[str, float], str]:
        encoded = [[encode(sample) for sample in samples] for samples in groups] if world_size() > 1 else []
        return await self._all("step", lambda t: t.step(groups, version), groups=encoded, version=version)

    async def score(self, samples: Sequence[Sample]) -> float:
        """The mean negative log-probability of the samples' trained tokens."""
        encoded = [[encode(sample) for sample in samples]] if world_size() > 1 else []
        return await self._all("score", lambda t: t.score(samples), groups=encoded)

    async def digest(self) -> str:
        return await self._all("digest", lambda t: t.digest())

    async def freeze(self, run: str, version: int) -> Callable[[], Snapshot]:
        """What finishes the snapshot, on another thread than torch's (Training.freeze)."""
        return await self._all("freeze", lambda t: t.freeze(run, version), run=run, version=version)

    async def save(self, folder: Path) -> None:
        await self._all("save", lambda t: t.save(folder), folder=str(folder))

    async def load(self, folder: Path) -> None:
        await self._all("load", lambda t: t.load(folder), folder=str(folder))

    async def stop(self) -> None:
        if self._training is not None:
            await self._all("stop", lambda t: t.close())

    async def _all(self, command: str, own: Callable[[Training], _Result], **arguments: Any) -> _Result:
        training = self._training
        if training is None:
            raise RuntimeError("the trainer's ranks are not open")

        def run() -> _Result:
            _broadcast({"command": command, **arguments})
            return own(training)

        return await self._thread.run(run)


def follow(recipe: Recipe, model: Path) -> None:
    """The life of a rank other than 0."""
    enter_thread()
    training = Training(recipe, model)
    while True:
        order = _broadcast(None)
        match order["command"]:
            case "step":
                training.step([[_sample(data) for data in group] for group in order["groups"]], order["version"])
            case "score":
                training.score([_sample(data) for data in order["groups"][0]])
            case "digest":
                training.digest()
            case "freeze":
                for _ in training.backend.export_weights():
                    pass  # takes part in the gathering
            case "save":
                training.save(Path(order["folder"]))
            case "load":
                training.load(Path(order["folder"]))
            case "stop":
                training.close()
                return


def _sample(data: bytes) -> Sample:
    message = decode(data)
    if not isinstance(message, Sample):
        raise TypeError(f"rank 0 sent a {message.kind} for a sample")
    return message


def _broadcast(order: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's order on every rank."""
    if world_size() == 1:
        return order or {}
    data = msgpack.packb(order) if order is not None else b""
    size = torch.tensor([len(data)])
    torch.distributed.broadcast(size, 0)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if order is not None:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    torch.distributed.broadcast(buffer, 0)
    return dict(msgpack.unpackb(buffer.numpy().tobytes()))
