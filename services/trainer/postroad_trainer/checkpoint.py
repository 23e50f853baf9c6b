"""Checkpoints of design §4.2: parameters, optimizer and RNG from the backend, with the position in the logs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used; the message says which and why."""


@dataclass(frozen=True)
class Position:
    """Where the run stands: `step` steps are trained, `version` is made, and its parameters have `digest`. Groups
    below `next_number` are resolved; samples of later groups lie in SAMPLES at `sample_sequence` or after it."""

    run: str
    step: int
    version: int
    digest: str
    next_number: int
    sample_sequence: int


class Checkpoints:
    """The checkpoints of one run: folders that appear whole or not at all; the newest `keep` are kept."""

    def __init__(self, folder: Path, run: str, keep: int) -> None:
        self.folder, self.run, self.keep = folder, run, keep

    def newest(self) -> tuple[Path, Position] | None:
        return next(iter(self._all()), None)

    def at_or_before(self, step: int) -> tuple[Path, Position] | None:
        """The newest checkpoint that has trained at most `step` steps."""
        return next((entry for entry in self._all() if entry[1].step <= step), None)

    def save(self, position: Position, save_backend: Callable[[Path], None]) -> Path:
        final = self.folder / f"step-{position.step:08d}"
        temporary = self.folder / f".step-{position.step:08d}.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_backend(temporary / "backend")
        with open(temporary / "position.json", "w") as file:
            json.dump(asdict(position), file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(self.folder)
        for old, _ in self._all()[self.keep :]:
            shutil.rmtree(old)
        return final

    def _all(self) -> list[tuple[Path, Position]]:
        found = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                position = Position(**json.loads((path / "position.json").read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is not a checkpoint ({error}); move it away to go on without it"
                ) from error
            if position.run != self.run:
                raise CheckpointError(f"{path} belongs to run {position.run!r}, not to {self.run!r}")
            found.append((path, position))
        return found


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
