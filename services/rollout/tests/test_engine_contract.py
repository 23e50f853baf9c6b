"""The engine contract: what the router, the worker and the weight plane need of any engine's HTTP interface.

Runs against the engine at POSTROAD_ENGINE_URL (SGLang, say; bearer key in POSTROAD_ENGINE_KEY), else against the
embedded engine with a tiny model. Nothing here is particular to ours.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest

PROMPT = [5, 17, 3, 44, 90, 21, 8, 60]


@contextlib.contextmanager
def embedded(folders: dict[str, Path], *options: str) -> Iterator[str]:
    """The URL of an embedded engine in a process of its own."""
    command = [sys.executable, "-m", "postroad_rollout.engine.server", "--model", str(folders["qwen3_moe"])]
    options = ("--port", "0", "--dtype", "float32", *options)
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[httpx.Client]:
    key = os.environ.get("POSTROAD_ENGINE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    given = os.environ.get("POSTROAD_ENGINE_URL")
    with (
        contextlib.nullcontext(given) if given else embedded(folders) as url,
        httpx.Client(base_url=str(url), timeout=60, headers=headers) as client,
    ):
        yield client


def generate(client: httpx.Client, **body: Any) -> Any:
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **body.pop("sampling_params", {})}
    response = client.post(
        "/generate", json={"input_ids": PROMPT, "return_logprob": True, "sampling_params": params, **body}
    )
    assert response.status_code == 200, response.text
    return response.json()


def test_health_and_model_information(client):
    assert client.get("/health").status_code == 200
    assert client.get("/health_generate").status_code == 200
    assert "weight_version" in client.get("/model_info").json()
    assert client.get("/metrics").status_code == 200


def test_tokens_and_log_probabilities_agree_in_length(client):
    meta = generate(client)["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(PROMPT), 8)
    assert len(meta["output_token_logprobs"]) == 8
    assert all(entry[0] <= 1e-6 for entry in meta["output_token_logprobs"])
    assert meta["finish_reason"]["type"] == "length"


def test_greedy_is_deterministic_and_a_seed_repeats(client):
    assert generate(client)["output_ids"] == generate(client)["output_ids"]
    seeded = {"temperature": 1.0, "sampling_seed": 3, "max_new_tokens": 16}
    assert (
        generate(client, sampling_params=seeded)["output_ids"] == generate(client, sampling_params=seeded)["output_ids"]
    )


def test_a_batch_answers_in_order(client):
    answers = generate(client, input_ids=[PROMPT, PROMPT[:4], PROMPT])
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [8, 4, 8]
    assert answers[0]["output_ids"] == answers[2]["output_ids"]


def test_a_stream_ends_as_the_whole_answer(client):
    whole = generate(client)
    body = {"input_ids": PROMPT, "stream": True, "return_logprob": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    with client.stream("POST", "/generate", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    last = json.loads(lines[-2])
    assert last["output_ids"] == whole["output_ids"] and last["meta_info"]["finish_reason"]["type"] == "length"


def test_a_stop_token_stops(client):
    token = generate(client)["output_ids"][2]
    answer = generate(client, sampling_params={"stop_token_ids": [token]})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    assert token in answer["output_ids"][:3]


def test_pause_and_continue(client):
    assert client.post("/pause_generation", json={"mode": "retract"}).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json={"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}, timeout=1)
    assert client.post("/continue_generation", json={}).status_code == 200
    assert len(generate(client)["output_ids"]) == 8


def test_the_version_label_is_set_and_read_back(client):
    before = client.get("/model_info").json()["weight_version"]
    response = client.post("/update_weight_version", json={"new_version": "41", "abort_all_requests": False})
    assert response.status_code == 200
    assert generate(client)["meta_info"]["weight_version"] == "41"
    client.post("/update_weight_version", json={"new_version": before, "abort_all_requests": False})


@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": [10**7]},
        {"input_ids": PROMPT * 10_000},
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"max_new_tokens": "many"}},
        {"input_ids": "text"},
    ],
)
def test_bad_input_is_the_client_s_fault(client, body):
    response = client.post("/generate", json={"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}, **body})
    assert 400 <= response.status_code < 500, response.text


def test_an_abort_is_answered(client):
    assert client.post("/abort_request", json={"rid": "nobody"}).status_code == 200
    assert client.post("/flush_cache").status_code == 200


# ── what the router relies on ────────────────────────────────────────────────────────────────────────────────────────
def load_of(client: httpx.Client) -> dict[str, float]:
    """Requests that run or wait, from /metrics: the embedded engine's names, or SGLang's."""
    lines = (line.split() for line in client.get("/metrics").text.splitlines() if line and line[0] != "#")
    values = {line[0].partition("{")[0]: float(line[-1]) for line in lines}
    return {
        "running": values.get("postroad_engine_running", values.get("sglang:num_running_reqs", 0.0)),
        "generated": values.get("postroad_engine_generated_tokens_total", 0.0),
    }


def test_prompt_and_answer_beyond_the_longest_sequence_are_refused(client):
    length = client.get("/model_info").json().get("max_length") or client.get("/server_info").json()["context_length"]
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": length - len(PROMPT) + 1}}
    response = client.post("/generate", json=body)
    assert response.status_code == 400 and "maximum context length" in response.text


def test_a_stop_string_stops_and_stays_in_the_tokens(client):
    if not client.get("/model_info").json().get("tokenizer", True):
        pytest.skip("the model has no tokenizer")
    text = generate(client)["text"]
    stop = text[2:4]
    kept = generate(client, sampling_params={"stop": [stop], "no_stop_trim": True})
    cut = generate(client, sampling_params={"stop": [stop]})
    assert kept["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert kept["text"].endswith(stop) and not cut["text"].endswith(stop)
    assert kept["output_ids"] == generate(client)["output_ids"][: len(kept["output_ids"])]


def test_a_client_that_leaves_ends_its_request(client):
    params = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
    body = {"input_ids": PROMPT, "stream": True, "sampling_params": params}
    for _ in range(8):
        with client.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
    end = time.monotonic() + 10
    while load_of(client)["running"]:
        assert time.monotonic() < end, "the request of a client that left still runs"
    assert len(generate(client)["output_ids"]) == 8


def test_every_token_has_its_version(client):
    meta = generate(client)["meta_info"]
    if "weight_versions" in meta:  # SGLang has one version for the answer
        assert [(start, end) for start, end, _ in meta["weight_versions"]] == [(0, 8)]
        assert str(meta["weight_versions"][0][2]) == meta["weight_version"]


def test_routed_experts_from_a_start_are_the_end_of_all(client):
    whole = generate(client, return_routed_experts=True)
    rows = len(PROMPT) + 7
    experts = np.frombuffer(base64.b64decode(whole["meta_info"]["routed_experts"]), "<i4").reshape(rows, -1)
    for start in (3, len(PROMPT) - 1):
        part = generate(client, return_routed_experts=True, routed_experts_start_len=start)
        again = np.frombuffer(base64.b64decode(part["meta_info"]["routed_experts"]), "<i4")
        assert np.array_equal(again.reshape(rows - start, -1), experts[start:])


def test_msgpack_frames_say_the_same_as_the_whole_answer(client):
    """Where the engine offers them: SGLang answers events."""
    whole = generate(client, return_routed_experts=True)
    body = {
        "input_ids": PROMPT, "stream": True, "return_logprob": True, "return_routed_experts": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
    }  # fmt: skip
    response = client.post("/generate", json=body, headers={"Accept": "application/msgpack"})
    if response.headers["content-type"] != "application/msgpack":
        pytest.skip("this engine has no msgpack")
    frames, data = [], response.content
    while data:
        (size,) = struct.unpack("<I", data[:4])
        frames.append(msgpack.unpackb(data[4 : 4 + size]))
        data = data[4 + size :]
    assert [token for frame in frames for token in frame["output_ids"]] == whole["output_ids"]
    assert frames[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    rows = [frame["meta_info"]["routed_experts"] for frame in frames]
    experts = np.concatenate([np.frombuffer(row["data"], row["dtype"]).reshape(row["shape"]) for row in rows])
    expected = np.frombuffer(base64.b64decode(whole["meta_info"]["routed_experts"]), "<i4")
    assert experts.dtype == np.uint8 and np.array_equal(experts.ravel(), expected)
