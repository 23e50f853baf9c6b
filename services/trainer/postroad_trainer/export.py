"""The trained model as a Hugging Face folder, for whoever wants to use it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from postroad.config import Environment
from postroad.weights import Snapshot
from postroad_trainer.ranks import Leader
from postroad_trainer.training import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
NOT_COPIED = {"model.safetensors.index.json"}


async def export_model(leader: Leader, environment: Environment, version: int) -> Path:
    """Write `<folder>/model` whole or not at all: weights of `version`, configuration and tokenizer of the base."""
    snapshot = await asyncio.to_thread(await leader.freeze(environment.run, version))
    try:
        return await asyncio.to_thread(_write, snapshot, environment.model, environment.folder / "model")
    finally:
        snapshot.close()


def _write(snapshot: Snapshot, base: Path, final: Path) -> Path:
    temporary = final.with_name(final.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {}
    for entry, data in snapshot.tensors():
        tensors[entry.name] = torch.from_numpy(data.copy()).view(DTYPES[entry.dtype]).reshape(entry.shape)
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.name not in NOT_COPIED:
                shutil.copy2(file, temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final
