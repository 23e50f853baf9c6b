"""What the router costs: the same engine asked directly, through postroad, and through sglang-router.

The engine is a real HTTP server that streams 30 tokens a second to each stream (router_engine.py); engine, router and
clients are processes of their own, each on a core where there are enough. Latency is that of every token, from the
engine's sending to the client's receipt; "added" is what a path has over the direct one in the same run.

    .venv/bin/python benchmarks/router.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from router_load import Target, connect, short, streams
from runs import report
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from postroad.store import Store
from postroad.supervisor.servers import free_port, valkey_server

HERE = Path(__file__).parent
SGLANG_ROUTER = "sglang-router==0.3.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "postroad" / "sglang-router"
KEY, RUN = "benchmark-key", "benchmark"
RATE, TOKENS, TURNS, LAYERS, TOP_K = 30.0, 60, 20, 48, 8
READY_S = 60.0
ADDED_P50_MS, ADDED_P99_MS, SHORT_PER_S, RATIO, GROWTH_BYTES = 1.0, 5.0, 1500.0, 0.5, 64.0
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class Way:
    """A way to the engine; `process` is what stands in it."""

    target: Target
    process: psutil.Process | None
    turns: int = 1


def write_model(folder: Path) -> None:
    """One printable character a token; 48 layers of 128 experts, 8 of them a token."""
    folder.mkdir(parents=True)
    alphabet = {chr(code): code - 33 for code in range(33, 127)} | {" ": 94, "\n": 95}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "config.json").write_text(json.dumps({
        "vocab_size": len(alphabet), "eos_token_id": 0, "num_experts": 128, "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
    }))  # fmt: skip


def on_core(core: int) -> Any:
    """For a child process: the clients keep the first core, router and engine get the next ones."""
    cores = sorted(os.sched_getaffinity(0))
    return lambda: os.sched_setaffinity(0, {cores[core % len(cores)]})


@contextmanager
def started(command: list[str], core: int, environment: dict[str, str], log: Path) -> Iterator[psutil.Process]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, preexec_fn=on_core(core)
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextmanager
def postroad_router(folder: Path, redis_url: str, core: int, *, experts: bool) -> Iterator[tuple[int, psutil.Process]]:
    port, recipe = free_port(), folder / f"recipe-{experts}.yaml"
    recipe.write_text(json.dumps({
        "name": RUN, "model": {"path": str(folder / "model")}, "data": {"kind": "file", "path": "rows.jsonl"},
        "reward": {"grader": "exact"}, "trainer": {"steps": 1}, "router": {"concurrency": 4096},
        "rollout": {"engine": {"max_length": 65536}, "sampling": {"max_new_tokens": 64}, "routed_experts": experts},
    }))  # fmt: skip
    environment = {
        "POSTROAD_RUN": RUN, "POSTROAD_DIR": str(folder), "POSTROAD_RECIPE": str(recipe), "POSTROAD_NATS_URL": "none",
        "POSTROAD_MODEL": str(folder / "model"), "POSTROAD_REDIS_URL": redis_url, "POSTROAD_KEY": KEY,
        "POSTROAD_PORT": str(port), "POSTROAD_LOG_LEVEL": "WARNING",
    }  # fmt: skip
    command = [sys.executable, "-m", "postroad_router"]
    with started(command, core, environment, folder / f"router-{experts}.log") as process:
        asyncio.run(ready(Target("postroad", port), "/readyz"))
        yield port, process


@contextmanager
def sglang_router(folder: Path, engine: int, core: int) -> Iterator[tuple[int, psutil.Process] | None]:
    """None where it can't be installed or started here; the log says why."""
    python = CACHE / "bin" / "python"
    if not (CACHE / "done").exists():
        venv.create(CACHE, with_pip=True)
        done = subprocess.run([python, "-m", "pip", "install", "-q", SGLANG_ROUTER], capture_output=True, text=True)
        if done.returncode:
            print(f"sglang-router does not install here: {done.stderr.strip().splitlines()[-1:]}")
            yield None
            return
        (CACHE / "done").touch()
    port, log = free_port(), folder / "sglang-router.log"
    command = [
        str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port), "--worker-urls",
        f"http://127.0.0.1:{engine}", "--policy", "round_robin", "--prometheus-port", str(free_port()),
        "--log-level", "error",
    ]  # fmt: skip
    with started(command, core, {}, log) as process:
        try:
            asyncio.run(ready(Target("sglang-router", port), "/v1/models"))
        except (TimeoutError, RuntimeError) as error:
            print(f"sglang-router does not start here: {error!r}; {log.read_text()[-300:]}")
            yield None
            return
        yield port, process


async def ready(target: Target, path: str) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                client = await connect(target.port)
                await client.ask(target.request(path, None, Authorization=f"Bearer {KEY}"))
                client.transport.close()
                return
            except (OSError, RuntimeError):
                await asyncio.sleep(0.1)


def percentiles(late_ms: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(late_ms, [50, 99])
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def measure(paths: list[Way], engine: Target, counts: list[int], requests: int) -> list[dict[str, Any]]:
    """A row for each path: latency and cost at each number of streams, and short requests."""
    rows = []
    for path in paths:
        row: dict[str, Any] = {"path": path.target.name}
        for count in counts:
            before, begun = cpu_s(path.process), time.monotonic()
            tokens, turns = (TOKENS, 1) if path.turns == 1 else (TOKENS // 6, path.turns)
            late = uvloop.run(streams(path.target, engine, count, tokens, turns))
            row[f"{count}_streams"] = percentiles(late) | {
                "tokens_per_s": round(len(late) / (time.monotonic() - begun), 1),
                "cpu_us_per_token": round((cpu_s(path.process) - before) / len(late) * 1e6, 1),
            }
        if path.turns == 1:
            before = cpu_s(path.process)
            seconds = [uvloop.run(short(path.target, requests // 3, 32)) for _ in range(3)]
            spent = cpu_s(path.process) - before
            row["short_per_s"] = round(requests // 3 / statistics.median(seconds), 1)
            row["short_per_cpu_s"] = round(requests // 3 * 3 / spent, 1) if spent else None
        row["rss_mib"] = None if path.process is None else round(path.process.memory_info().rss / 2**20, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    for row in rows[1:]:
        for count in counts:
            here, direct = row[f"{count}_streams"], rows[0][f"{count}_streams"]
            here |= {f"added_{name}": round(here[name] - direct[name], 3) for name in ("p50_ms", "p99_ms")}
    return rows


def cpu_s(process: psutil.Process | None) -> float:
    return 0.0 if process is None else sum(process.cpu_times()[:2])


def growth(path: Way, requests: int) -> float:
    """Bytes of resident memory per request, over the second half of `requests`."""
    assert path.process is not None
    points = []
    for _ in range(20):
        uvloop.run(short(path.target, requests // 20, 32))
        points.append((len(points) * requests / 20, path.process.memory_info().rss))
    done, resident = np.array(points[10:], dtype=float).T
    return float(np.polyfit(done, resident, 1)[0])


async def register(redis_url: str, port: int) -> None:
    store = await Store.connect(redis_url, RUN)
    details = {
        "url": f"http://127.0.0.1:{port}",
        "pid": 1,
        "version": 1,
        "digest": "d",
        "state": "ready",
        "slots": 1024,
    }
    await store.register("engine", "engine-0", details, 3600)
    await store.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 64 streams, fewer requests")
    parser.add_argument("--json", action="store_true", help="the last line is all figures as JSON")
    arguments = parser.parse_args()
    counts, requests = ([1, 64], 1500) if arguments.quick else ([1, 64, 256], 6000)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))} if (os.cpu_count() or 1) > 2 else os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="postroad-router-") as name, ExitStack() as stack:
        folder = Path(name)
        write_model(folder / "model")
        server = valkey_server(folder / "valkey", free_port(), secrets.token_hex(8))
        stack.enter_context(started(list(server.command), 0, {}, folder / "valkey.log"))
        port = free_port()
        command = [sys.executable, str(HERE / "router_engine.py"), str(port), str(RATE), str(LAYERS), str(TOP_K)]
        stack.enter_context(started(command, 2, {}, folder / "engine.log"))
        engine = Target("direct", port)
        asyncio.run(ready(engine, "/health"))
        asyncio.run(register(server.url, port))
        key = {"Authorization": f"Bearer {KEY}"}
        own = stack.enter_context(postroad_router(folder, server.url, 1, experts=False))
        capturing = stack.enter_context(postroad_router(folder, server.url, 1, experts=True))
        other = stack.enter_context(sglang_router(folder, port, 1))
        plain = Way(Target("postroad", own[0], key), own[1])
        paths = [
            Way(engine, None), plain, Way(Target("postroad, sessions of 20 turns", own[0], key), own[1], TURNS),
            Way(Target("postroad, sessions, R3 48x8", capturing[0], key), capturing[1], TURNS),
        ]  # fmt: skip
        if other is not None:
            paths.append(Way(Target("sglang-router", other[0]), other[1]))
        rows = measure(paths, engine, counts, requests)
        slope = growth(plain, 10_000 if arguments.quick else 100_000)
    return conclude(rows, slope, arguments.json)


def conclude(rows: list[dict[str, Any]], slope: float, as_json: bool) -> int:
    own, other = rows[1], next((row for row in rows if row["path"] == "sglang-router"), None)
    print(f"memory of the router: {slope:.1f} bytes a request over the second half; load average {os.getloadavg()}")
    bars = {
        f"64 streams: p50 adds at most {ADDED_P50_MS} ms": own["64_streams"]["added_p50_ms"] <= ADDED_P50_MS,
        f"64 streams: p99 adds at most {ADDED_P99_MS} ms": own["64_streams"]["added_p99_ms"] <= ADDED_P99_MS,
        f"at least {SHORT_PER_S:.0f} short requests per second of a core": own["short_per_cpu_s"] >= SHORT_PER_S,
        f"memory grows by less than {GROWTH_BYTES} bytes a request": slope < GROWTH_BYTES,
    }
    if other is not None:
        reached = own["short_per_cpu_s"] >= RATIO * other["short_per_cpu_s"]
        bars[f"at least {RATIO} of sglang-router's short requests per second of a core"] = reached
    return report({"rows": rows, "bytes_per_request": round(slope, 1)}, bars, as_json)


if __name__ == "__main__":
    sys.exit(main())
