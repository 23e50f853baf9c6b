"""Engines on tiny models with random weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postroad_rollout.engine.engine import Engine
from postroad_rollout.engine.settings import EngineSettings

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib hides the modules beside the tests

from engine_models import KINDS, make_model, write_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        make_model(kind).save_pretrained(made[kind])
        write_tokenizer(made[kind])
    return made


@pytest.fixture
def engine(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine on the kind that the test's `kind` mark names (llama without one)."""
    mark = request.node.get_closest_marker("kind")
    kind = mark.args[0] if mark else "llama"
    made = Engine(
        EngineSettings(model_path=folders[kind], dtype="float32", slots=20, max_length=96, weight_digest="d0")
    )
    made.start()
    yield made
    made.close()
