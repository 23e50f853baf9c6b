"""The SGLang adapter beside a stand-in, which forces the faults. With SGLang itself: benchmarks/gpu.py, on a GPU."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import torch

from postroad.config import Environment, Recipe
from postroad_rollout.engine.errors import ActivationError
from postroad_rollout.sglang.engine import SGLangEngine
from postroad_rollout.sglang.server import SGLangError, SGLangServer, arguments_of, flags
from postroad_rollout.sglang.weights import StagedWeights

KEY = "mesh-key"
STAND_IN = [sys.executable, str(Path(__file__).with_name("sglang_stand_in.py"))]
TENSORS = [("a", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)), ("b", torch.tensor([1.5, -2.0]))]


def recipe_of(**options: object) -> Recipe:
    return Recipe.model_validate({
        "model": {"bundled": "tiny-llama"}, "data": {"kind": "class", "path": "a:b"}, "reward": {"grader": "exact"},
        "trainer": {"steps": 1},
        "rollout": {"engine": {"kind": "sglang", "slots": 8, "sglang": {"options": options}}},
    })  # fmt: skip


def environment_in(folder: Path) -> Environment:
    return Environment("run", folder, folder / "recipe.yaml", "nats://x", "redis://x", KEY, folder / "model")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[SGLangServer]:
    made = SGLangServer(recipe_of(), environment_in(tmp_path), STAND_IN)
    made.launch()
    try:
        await made.ready()
        yield made
    finally:
        made.kill()


def test_arguments_are_the_recipes_and_the_options(tmp_path: Path) -> None:
    words = arguments_of(recipe_of(tp_size=2, **{"mem-fraction-static": 0.4}), environment_in(tmp_path), 5000)
    given = dict(itertools.pairwise(words))
    assert given["--tp-size"] == "2" and given["--mem-fraction-static"] == "0.4" and given["--port"] == "5000"
    assert given["--max-running-requests"] == "8" and "--enable-return-routed-experts" not in words
    assert KEY not in words


def test_an_option_that_the_recipe_decides_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SGLangError, match="context-length"):
        arguments_of(recipe_of(context_length=5), environment_in(tmp_path), 5000)


def test_flags() -> None:
    assert flags({"a": True, "b": False, "c": None, "d": [1, 2], "e": "x"}) == ["--a", "--d", "1", "2", "--e", "x"]


def test_without_sglang_the_message_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SGLangError, match="pip install sglang"):
        SGLangServer(recipe_of(), environment_in(tmp_path))


def test_staged_weights_are_the_tensors_and_use_the_buffer_again() -> None:
    first = StagedWeights.copy_of(TENSORS, "cpu")
    second = StagedWeights.copy_of([(name, tensor * 2) for name, tensor in TENSORS], "cpu", first)
    assert second.buffer is first.buffer
    for (name, tensor), place in zip(TENSORS, second.places, strict=True):
        whole = second.buffer[place.start : place.end].view(place.dtype).reshape(place.shape)
        assert place.name == name and torch.equal(whole, tensor * 2)


@pytest.mark.parametrize(
    ("mode", "paths", "flush", "abort"),
    [
        ("finish", ["update_weights_from_tensor"], True, False),
        ("continue", ["update_weights_from_tensor"], True, True),
        ("keep_kv", ["pause_generation", "update_weights_from_tensor", "continue_generation"], False, False),
    ],
)
async def test_a_switch_is_one_update_that_names_the_version(
    server: SGLangServer, mode: str, paths: list[str], flush: bool, abort: bool
) -> None:
    engine = SGLangEngine(server.url, KEY, lambda staged: f"{len(staged.places)} places", device="cpu")
    await asyncio.to_thread(engine.stage, TENSORS)
    assert await asyncio.to_thread(engine.activate, 7, "d7", mode) > 0
    asked = httpx.get(f"{server.url}/asked").json()
    update = dict(asked)["update_weights_from_tensor"]
    assert [path for path, _ in asked] == paths
    assert (update["flush_cache"], update["abort_all_requests"], update["weight_version"]) == (flush, abort, "7")
    assert update["serialized_named_tensors"] == ["2 places"]
    assert (engine.version, engine.digest) == (7, "d7")
    engine.close()


async def test_refused_weights_are_an_error_and_generation_goes_on(server: SGLangServer) -> None:
    engine = SGLangEngine(server.url, KEY, lambda _: "", device="cpu")
    await asyncio.to_thread(engine.stage, TENSORS)
    httpx.post(f"{server.url}/break")
    with pytest.raises(ActivationError, match="shape mismatch"):
        await asyncio.to_thread(engine.activate, 3, "d3", "keep_kv")
    assert httpx.get(f"{server.url}/asked").json()[-1][0] == "continue_generation"
    assert (engine.version, engine.digest) == (0, "")
    engine.close()


async def test_a_server_that_ends_is_noticed_and_nothing_of_it_is_left(server: SGLangServer) -> None:
    grandchild = httpx.get(f"{server.url}/health").json()["grandchild"]
    watching = asyncio.create_task(server.watch())
    await asyncio.sleep(0)
    assert server._process is not None
    server._process.kill()
    with pytest.raises(RuntimeError, match="SGLang ended with code -9"):
        await asyncio.wait_for(watching, 20)
    await gone(grandchild)


async def test_kill_ends_the_whole_tree(server: SGLangServer) -> None:
    grandchild = httpx.get(f"{server.url}/health").json()["grandchild"]
    server.kill()
    assert server._process is not None and server._process.returncode == -9
    await gone(grandchild)


async def gone(pid: int, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while os.path.exists(f"/proc/{pid}") and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, f"process {pid} still runs"
        await asyncio.sleep(0.02)
