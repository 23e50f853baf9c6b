"""Prefill and decode in two processes: the same answer as from one, and clear failures where a half is missing."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from postroad_rollout.engine import handover
from postroad_rollout.engine.errors import HandoverError
from postroad_rollout.engine.handover import Address, Bootstrap, Handover, fetch

PROMPT = [5, 17, 3, 44, 90, 21, 8, 60]


@contextlib.contextmanager
def server(folder: Path, role: str) -> Iterator[tuple[httpx.Client, int]]:
    """A client of the engine, and its bootstrap port."""
    command = [sys.executable, "-m", "postroad_rollout.engine.server", "--model", str(folder), "--role", role]
    process = subprocess.Popen(
        [*command, "--port", "0", "--dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[-1]) if role == "prefill" else 0
        with httpx.Client(base_url=process.stdout.readline().split()[-1], timeout=60) as client:
            yield client, port
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> Iterator[dict[str, tuple[httpx.Client, int]]]:
    with contextlib.ExitStack() as stack:
        yield {role: stack.enter_context(server(folders["qwen3_moe"], role)) for role in ("mixed", "prefill", "decode")}


def paired(engines: dict[str, tuple[httpx.Client, int]], room: Any, body: dict[str, Any]) -> list[httpx.Response]:
    count = len(room) if isinstance(room, list) else None
    port: Any = engines["prefill"][1]
    fields = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
    if count is not None:
        fields |= {"bootstrap_host": ["127.0.0.1"] * count, "bootstrap_port": [port] * count}
    with ThreadPoolExecutor(2) as pool:
        clients = [engines[role][0] for role in ("prefill", "decode")]
        return list(pool.map(lambda client: client.post("/generate", json=body | fields), clients))


def body_of(prompt: Any, **params: Any) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, **params}
    return {"input_ids": prompt, "return_logprob": True, "return_routed_experts": True, "sampling_params": params}


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 6, PROMPT[:1]])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "sampling_seed": 11}])
def test_a_pair_answers_as_a_mixed_engine(engines, prompt, params):
    body = body_of(prompt, **params)
    alone = engines["mixed"][0].post("/generate", json=body).json()
    room = len(prompt) * 1000 + len(params)
    prefill, decode = paired(engines, room, body)
    assert prefill.status_code == decode.status_code == 200, (prefill.text, decode.text)
    answer = decode.json()
    assert answer["output_ids"] == alone["output_ids"]
    assert answer["meta_info"]["routed_experts"] == alone["meta_info"]["routed_experts"]
    assert answer["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert prefill.json()["output_ids"] == [] and prefill.json()["meta_info"]["prompt_tokens"] == len(prompt)
    pairs = zip(answer["meta_info"]["output_token_logprobs"], alone["meta_info"]["output_token_logprobs"], strict=True)
    assert max(abs(one[0] - other[0]) for one, other in pairs) < 1e-4


def test_a_batch_has_a_room_for_each(engines):
    prompts = [PROMPT, PROMPT[:3], PROMPT[2:]]
    alone = engines["mixed"][0].post("/generate", json=body_of(prompts)).json()
    prefill, decode = paired(engines, [1, 2, 3], body_of(prompts))
    assert prefill.status_code == decode.status_code == 200
    assert [one["output_ids"] for one in decode.json()] == [one["output_ids"] for one in alone]


def test_a_half_that_is_missing_or_wrong(engines):
    bare = engines["prefill"][0].post("/generate", json=body_of(PROMPT))
    assert bare.status_code == 400 and "bootstrap_room" in bare.text
    lists = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1}
    assert engines["decode"][0].post("/generate", json=body_of(PROMPT) | lists).status_code == 400
    scored = engines["decode"][0].post(
        "/generate", json=body_of(PROMPT) | lists | {"bootstrap_room": 9, "logprob_start_len": 0}
    )
    assert scored.status_code == 400 and "logprob_start_len" in scored.text
    nobody = engines["decode"][0].post("/generate", json=body_of(PROMPT) | lists | {"bootstrap_room": 9})
    assert nobody.status_code == 503 and "127.0.0.1:1" in nobody.text


def test_keys_of_other_weights_are_not_used(engines):
    engines["prefill"][0].post("/update_weight_version", json={"new_version": 4})
    try:
        _, decode = paired(engines, 77, body_of(PROMPT))
        finish = decode.json()["meta_info"]["finish_reason"]
        assert finish["type"] == "abort" and "version 4" in finish["message"]
    finally:
        engines["prefill"][0].post("/update_weight_version", json={"new_version": 0})


# ── the handshake alone ──────────────────────────────────────────────────────────────────────────────────────────────
def computed(tokens: list[int]) -> Handover:
    keys_values = torch.arange(2 * 2 * 2 * len(tokens) * 4, dtype=torch.float32).reshape(2, 2, 2, len(tokens), 4)
    experts = np.arange(len(tokens) * 4, dtype=np.uint8).reshape(len(tokens), 2, 2)
    return Handover(3, "d", np.array(tokens, np.int32), keys_values.to(torch.bfloat16), experts)


async def test_what_is_offered_is_fetched_whoever_comes_first():
    bootstrap = Bootstrap("key")
    port = await bootstrap.open("127.0.0.1", 0)
    try:
        for early in (True, False):
            fetching = asyncio.create_task(fetch(Address("127.0.0.1", port, 5), "key", [1, 2])) if early else None
            async with bootstrap.room(5) as room:
                room.offered.set_result(computed([1, 2]))
                got = await (fetching or fetch(Address("127.0.0.1", port, 5), "key", [1, 2]))
                assert await room.fetched == ""
            assert torch.equal(got.keys_values, computed([1, 2]).keys_values) and got.version == 3
            assert np.array_equal(got.experts, computed([1, 2]).experts)
    finally:
        await bootstrap.close()


@pytest.mark.parametrize("fault", ["secret", "prompt", "damage", "given up", "silence"])
async def test_a_handover_that_fails_says_why(fault, monkeypatch):
    bootstrap = Bootstrap("key")
    port = await bootstrap.open("127.0.0.1", 0)
    says = {"secret": "secret is wrong", "prompt": "another prompt", "damage": "damaged", "given up": "nothing was computed",
            "silence": "did not hand over"}[fault]  # fmt: skip
    if fault == "silence":
        monkeypatch.setattr(handover, "ROOM_S", 0.2)
    if fault == "damage":
        honest = Handover.header
        monkeypatch.setattr(Handover, "header", lambda self, parts: honest(self, parts) | {"checksums": ["0", "0"]})
    asking = fetch(
        Address("127.0.0.1", port, 6), "wrong" if fault == "secret" else "key", [7 if fault == "prompt" else 1]
    )
    fetching = asyncio.create_task(asking)
    try:
        if fault == "given up":
            async with bootstrap.room(6):
                await asyncio.sleep(0)
            with pytest.raises(HandoverError, match=says):
                async with bootstrap.room(6):
                    await asyncio.wait({fetching}, timeout=0.2)
                await fetching
            return
        async with bootstrap.room(6) as room:
            if fault != "silence":
                room.offered.set_result(computed([1]))
            with pytest.raises(HandoverError, match=says):
                await fetching
            if fault in ("prompt", "damage"):
                assert "was left" in await asyncio.wait_for(room.fetched, 5)
    finally:
        await bootstrap.close()


def test_empty_parts_are_handed_over():
    """A model without experts and a prompt of one token have empty parts."""
    empty = Handover(0, "", np.zeros(0, np.int32), torch.empty(2, 2, 2, 0, 4), np.empty((0, 0, 0), np.uint8))
    parts = empty.parts()
    got = handover._checked(empty.header(parts), [bytes(part) for part in parts], [])
    assert got.keys_values.shape == (2, 2, 2, 0, 4) and got.experts.shape == (0, 0, 0)
