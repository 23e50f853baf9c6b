"""What an engine that serves loses while it pulls: the engine's own process, driven over HTTP, with a publisher beside it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from postroad.bus import Bus
from postroad.store import Store
from postroad.weights import Publisher, Snapshot

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".venv/share/postroad/models/smollm2"
RUN, KEY = "serving", "benchmark-key"
EVERY_S = 5.0
REQUESTS = 8
TICK_S = 0.1
DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


@dataclass
class Serving:
    """Tokens per second: alone, with a version every `every_s` seconds, and in the ticks in which one was pulled."""

    size_bytes: int
    alone: float
    pulling: float
    during: float
    ratio: float  # median over the cycles: with a pull, of the time without one just before it
    pull_s: float
    every_s: float = EVERY_S
    transports: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def read_model(path: Path) -> list[tuple[str, str, tuple[int, ...], np.ndarray]]:
    """The tensors of a safetensors file, without torch: numpy has no bfloat16."""
    import json

    data = np.fromfile(path / "model.safetensors", dtype=np.uint8)
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    return [
        (name, DTYPES[e["dtype"]], tuple(e["shape"]), data[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in header.items()
    ]


async def serve_and_pull(nats_url: str, redis_url: str, folder: Path, seconds: float) -> Serving:
    bus, store = await Bus.connect(nats_url, RUN), await Store.connect(redis_url, RUN)
    await bus.create_streams()
    publisher = Publisher(bus, store, KEY)
    await publisher.start()
    tensors = read_model(MODEL)
    manifest = await publisher.publish(await asyncio.to_thread(Snapshot.freeze, RUN, 1, tensors), "d1")
    environment = os.environ | {
        "POSTROAD_RUN": RUN, "POSTROAD_DIR": str(folder), "POSTROAD_RECIPE": str(_recipe(folder)),
        "POSTROAD_MODEL": str(MODEL), "POSTROAD_NATS_URL": nats_url, "POSTROAD_REDIS_URL": redis_url,
        "POSTROAD_KEY": KEY, "POSTROAD_NAME": "engine-0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    engine = _start(folder, environment)
    try:
        url = await _ready(store)
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as client:
            load = [asyncio.create_task(_generate(client, number)) for number in range(REQUESTS)]
            await asyncio.sleep(3)
            alone, cycles = await _rates(client, publisher, tensors, seconds)
            for task in load:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
        engines = await store.members("engine")
        transports = [str(info["transport"]) for info in engines.values()]
    finally:
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        await publisher.close()
        await store.close()
        await bus.close()
    pulled = [rate for ticks in cycles for rate, busy in ticks if busy]
    with_pull = [statistics.mean(rate for rate, _ in ticks) for ticks in cycles]
    return Serving(
        manifest.size_bytes, statistics.median(alone), statistics.median(with_pull), statistics.mean(pulled or [0.0]),
        statistics.median(b / a for a, b in zip(alone, with_pull, strict=True)), len(pulled) * TICK_S / len(cycles),
        transports=transports,
    )  # fmt: skip


def _recipe(folder: Path) -> Path:
    """The demo's, whose engine keeps its KV cache at a switch: what is computed again after one is no part of a pull."""
    recipe = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text())
    recipe["rollout"]["engine"]["update"] = "keep_kv"
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "engine.log").open("w") as log:
        command = [sys.executable, "-m", "postroad_rollout.engine_service"]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


async def _ready(store: Store) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for info in (await store.members("engine")).values():
            if info["state"] == "ready" and info["version"] == 1:
                return str(info["url"])
        await asyncio.sleep(0.2)
    raise TimeoutError("the engine did not serve version 1 within 120 s")


async def _generate(client: httpx.AsyncClient, number: int) -> None:
    """Requests without an end, one after another."""
    while True:
        parameters = {"max_new_tokens": 120, "temperature": 1.0, "ignore_eos": True, "sampling_seed": number}
        answer = await client.post(
            "/generate", json={"input_ids": [1, 2, 3, 4 + number], "sampling_params": parameters}
        )
        answer.raise_for_status()


async def _tokens(client: httpx.AsyncClient) -> tuple[float, int]:
    text = (await client.get("/metrics")).text
    generated = re.search(r"^postroad_engine_generated_tokens_total ([\d.e+]+)", text, re.M)
    version = re.search(r"^postroad_engine_weight_version ([\d.e+]+)", text, re.M)
    assert generated is not None and version is not None
    return float(generated[1]), int(float(version[1]))


async def _rates(
    client: httpx.AsyncClient, publisher: Publisher, tensors: list[Any], seconds: float
) -> tuple[list[float], list[list[tuple[float, bool]]]]:
    """Tokens per second of EVERY_S without a pull, then of every tick of as long with one: (rate, is one pulled?); again
    and again."""
    alone: list[float] = []
    cycles: list[list[tuple[float, bool]]] = []
    for version in range(2, 2 + int(seconds / EVERY_S)):
        alone.append(statistics.mean(rate for rate, _ in await _ticks(client, version)))
        await publisher.make_room()
        for *_, data in tensors:
            data[0] ^= 1  # every bucket is another one, and has to be moved
        snapshot = await asyncio.to_thread(Snapshot.freeze, RUN, version, tensors)
        publishing = asyncio.create_task(publisher.publish(snapshot, f"d{version}"))
        cycles.append(await _ticks(client, version))
        await publishing
    return alone, cycles


async def _ticks(client: httpx.AsyncClient, version: int) -> list[tuple[float, bool]]:
    """Tokens per second of each tick of EVERY_S, and whether the engine did not serve `version` yet."""
    (count, _), last = await _tokens(client), time.monotonic()
    end, ticks = last + EVERY_S, []
    while last < end:
        await asyncio.sleep(TICK_S)
        (now_count, served), now = await _tokens(client), time.monotonic()
        ticks.append(((now_count - count) / (now - last), served < version))
        count, last = now_count, now
    return ticks
