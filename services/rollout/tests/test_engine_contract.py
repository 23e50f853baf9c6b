"""The engine contract: what the router, the worker and the weight plane need of any engine's HTTP interface.

Runs against the engine at POSTROAD_ENGINE_URL (SGLang, say; bearer key in POSTROAD_ENGINE_KEY), else against the
embedded engine with a tiny model. Nothing here is particular to ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

PROMPT = [5, 17, 3, 44, 90, 21, 8, 60]


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {os.environ.get('POSTROAD_ENGINE_KEY', '')}"}
    if url := os.environ.get("POSTROAD_ENGINE_URL"):
        yield httpx.Client(base_url=url, timeout=60, headers=headers)
        return
    command = [
        sys.executable,
        "-m",
        "postroad_rollout.engine.server",
        "--model",
        str(folders["qwen3_moe"]),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        with httpx.Client(base_url=process.stdout.readline().split()[-1], timeout=60) as embedded:
            yield embedded
    finally:
        process.terminate()
        process.wait(10)


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
