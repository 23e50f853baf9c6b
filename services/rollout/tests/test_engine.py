"""The embedded engine's numbers against transformers, and its promises about batches, prefixes and weight versions."""

from __future__ import annotations

import base64
import threading
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from engine_models import KINDS, make_model

from postroad_rollout.engine.app import create_app
from postroad_rollout.engine.engine import Engine
from postroad_rollout.engine.errors import ActivationError, EngineBusyError, TensorError, UnsupportedModelError
from postroad_rollout.engine.handover import Bootstrap
from postroad_rollout.engine.request import Request
from postroad_rollout.engine.sampling import SamplingParams
from postroad_rollout.engine.settings import EngineSettings
from postroad_rollout.engine.weights import read_folder

PROMPT = [5, 17, 3, 44, 90, 21, 8, 60, 33, 71, 12, 9]


class Asked:
    """A request and the event of its end."""

    def __init__(self, engine: Engine, prompt: list[int], own: dict[str, Any], **fields: Any) -> None:
        self.ended, self.engine = threading.Event(), engine
        seed = own.pop("sampling_seed", 7)
        params = SamplingParams(**{"ignore_eos": True, "max_new_tokens": 8, "temperature": 0.0, **own})
        self.request = Request(
            rid=fields.pop("rid", f"r{id(self)}"), prompt=prompt, params=params, seed=seed, notify=self._notify,
            return_logprob=True, **fields,
        )  # fmt: skip
        engine.submit(self.request)

    def _notify(self) -> None:
        if self.request.finish is not None:
            self.ended.set()

    def answer(self) -> dict[str, Any]:
        assert self.ended.wait(30), "the request did not end within 30 s"
        return self.request.answer(None)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def log_softmax(model: Any, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([tokens])).logits[0].float() / temperature).log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_log_probabilities_are_those_of_transformers(folders, kind):
    engine = Engine(EngineSettings(model_path=folders[kind], dtype="float32", slots=4, max_length=64))
    engine.start()
    try:
        model = make_model(kind)
        answer = Asked(engine, PROMPT, {"max_new_tokens": 12}).answer()
        assert answer["output_ids"] == greedy(model, PROMPT, 12)
        answer = Asked(engine, PROMPT, {"temperature": 0.7, "max_new_tokens": 12}, logprob_start=0).answer()
        whole = PROMPT + answer["output_ids"]
        expected = log_softmax(model, whole, 0.7)
        got = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        want = [float(expected[len(PROMPT) - 1 + i, token]) for i, token in enumerate(answer["output_ids"])]
        assert np.abs(np.array(got) - np.array(want)).max() < 1e-4
        scored = answer["meta_info"]["input_token_logprobs"]
        assert scored[0][0] is None and [entry[1] for entry in scored] == PROMPT
        want = [float(expected[i, token]) for i, token in enumerate(PROMPT[1:])]
        assert np.abs(np.array([entry[0] for entry in scored[1:]]) - np.array(want)).max() < 1e-4
    finally:
        engine.close()


@pytest.mark.kind("qwen3_moe")
def test_routed_experts_are_those_of_transformers(engine):
    answer = Asked(engine, PROMPT, {"max_new_tokens": 6}, return_experts=True).answer()
    rows = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), dtype="<i4")
    whole = PROMPT + answer["output_ids"]
    experts = rows.reshape(len(whole) - 1, 2, 2)
    model = make_model("qwen3_moe")
    with torch.no_grad():
        routers = model(torch.tensor([whole[:-1]]), output_router_logits=True).router_logits
    want = torch.stack([logits.topk(2).indices for logits in routers], 1).numpy()
    assert np.array_equal(np.sort(experts, -1), np.sort(want, -1))


def test_a_request_does_not_depend_on_its_neighbours(engine):
    def asks(number: int) -> tuple[list[int], dict[str, Any]]:
        return [*PROMPT[: 3 + number % 7], number], {"temperature": number % 2 * 1.0, "sampling_seed": number}

    alone = [Asked(engine, *asks(number)).answer()["output_ids"] for number in range(16)]
    engine.flush_cache()
    together = [Asked(engine, *asks(number)) for number in range(16)]
    assert [asked.answer()["output_ids"] for asked in together] == alone


def test_a_seed_repeats_and_another_differs(engine):
    own = {"temperature": 1.0, "max_new_tokens": 16}
    one, two, other = (
        Asked(engine, PROMPT, {**own, "sampling_seed": seed}).answer()["output_ids"] for seed in (1, 1, 2)
    )
    assert one == two != other


def test_a_shared_prefix_is_computed_once_and_changes_nothing(engine):
    first = Asked(engine, [*PROMPT, 1, 2], {}).answer()
    second = Asked(engine, [*PROMPT, 1, 2], {}).answer()
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == len(PROMPT) + 1
    assert second["output_ids"] == first["output_ids"]
    together = [Asked(engine, [*reversed(PROMPT), number], {}) for number in range(8)]
    cached = [asked.answer()["meta_info"]["cached_tokens"] for asked in together]
    assert cached.count(0) <= 1 and min(sorted(cached)[1:]) >= len(PROMPT)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"max_new_tokens": 3}, "length"),
        ({"stop_token_ids": frozenset(range(96))}, "stop"),
        ({"max_new_tokens": 500}, "length"),
    ],
)
def test_an_end_has_its_reason(engine, own, reason):
    assert Asked(engine, PROMPT, own).answer()["meta_info"]["finish_reason"]["type"] == reason


def test_truncated_sampling_stays_within_its_candidates(engine):
    first = log_softmax(make_model("llama"), PROMPT)[-1]
    allowed = set(first.topk(2).indices.tolist())
    drawn = {
        Asked(engine, PROMPT, {"temperature": 1.0, "top_k": 2, "max_new_tokens": 1, "sampling_seed": seed}).answer()[
            "output_ids"
        ][0]
        for seed in range(30)
    }
    assert drawn == allowed


def test_an_aborted_request_keeps_its_tokens(engine):
    asked = Asked(engine, PROMPT, {"max_new_tokens": 80}, rid="mine", stream=True)
    assert engine.abort("mine") <= 1
    answer = asked.answer()
    assert answer["meta_info"]["finish_reason"]["type"] in ("abort", "length")
    assert engine.abort("nobody") == 0


def test_the_queue_has_a_bound(folders):
    engine = Engine(EngineSettings(model_path=folders["llama"], dtype="float32", slots=1, max_length=64, max_waiting=2))
    engine.start()
    try:
        engine.pause("in_place")
        asked = [Asked(engine, PROMPT, {}) for _ in range(2)]
        with pytest.raises(EngineBusyError, match="2 requests are waiting"):
            Asked(engine, PROMPT, {})
        engine.resume()
        assert all(one.answer()["output_ids"] for one in asked)
    finally:
        engine.close()


@pytest.mark.kind("qwen3_moe")
def test_experts_belong_to_the_version_that_sampled_the_token(engine, tmp_path):
    """After a switch that computes the keys again, the rows of earlier tokens stay those of the old weights."""
    before = Asked(engine, PROMPT, {"max_new_tokens": 20}, return_experts=True).answer()
    engine.flush_cache()
    make_model("qwen3_moe", 1).save_pretrained(tmp_path)
    engine.stage(read_folder(tmp_path))
    asked = Asked(engine, PROMPT, {"max_new_tokens": 60}, return_experts=True)
    while not asked.request.output:
        pass
    engine.activate(1, "d1")
    answer = asked.answer()
    switch = answer["meta_info"]["weight_versions"][0][1]
    rows = [
        np.frombuffer(base64.b64decode(a["meta_info"]["routed_experts"]), "<i4").reshape(-1, 4)
        for a in (answer, before)
    ]
    first, last = len(PROMPT) - 1, len(PROMPT) - 1 + min(switch, 20)
    assert np.array_equal(rows[0][first:last], rows[1][first:last])


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def weights(kind: str, seed: int) -> list[tuple[str, torch.Tensor]]:
    state = make_model(kind, seed).state_dict()
    return [(name, tensor) for name, tensor in state.items() if name != "lm_head.weight" or kind != "llama"]


def test_staged_weights_serve_only_once_they_are_activated(engine):
    before = Asked(engine, PROMPT, {}).answer()["output_ids"]
    engine.stage(weights("llama", 1))
    assert Asked(engine, PROMPT, {}).answer()["output_ids"] == before
    assert engine.activate(1, "d1") < 1000
    answer = Asked(engine, PROMPT, {}).answer()
    assert answer["output_ids"] == greedy(make_model("llama", 1), PROMPT, 8) != before
    assert answer["meta_info"]["weight_versions"] == [[0, 8, 1]]
    assert answer["meta_info"]["weight_digests"] == {"1": "d1"}
    assert answer["meta_info"]["cached_tokens"] == 0  # no prefix of other weights is used


@pytest.mark.parametrize("fault", ["shape", "name", "missing", "dtype"])
def test_weights_that_do_not_fit_leave_the_served_ones(engine, fault):
    before = Asked(engine, PROMPT, {}).answer()["output_ids"]
    named = dict(weights("llama", 1))
    if fault == "shape":
        named["model.norm.weight"] = torch.ones(7)
    elif fault == "name":
        named["model.surprise"] = torch.ones(1)
    elif fault == "missing":
        del named["model.norm.weight"]
    else:
        named["model.norm.weight"] = torch.ones(32, dtype=torch.int32)
    with pytest.raises(TensorError):
        engine.stage(named.items())
    with pytest.raises(ActivationError, match="no weights are staged"):
        engine.activate(1, "d1")
    assert Asked(engine, PROMPT, {}).answer()["output_ids"] == before and engine.version == 0


@pytest.mark.parametrize("mode", ["continue", "keep_kv", "finish"])
def test_a_switch_in_mid_generation(engine, mode):
    engine.stage(weights("llama", 1))
    asked = Asked(engine, PROMPT, {"max_new_tokens": 60})
    while not asked.request.output:
        pass
    engine.activate(1, "d1", mode)
    answer = asked.answer()
    spans, tokens = answer["meta_info"]["weight_versions"], answer["output_ids"]
    assert [span[0] for span in spans[1:]] == [span[1] for span in spans[:-1]] and spans[-1][1] == 60
    switch = spans[0][1] if spans[0][2] == 0 else 0
    old, new = make_model("llama", 0), make_model("llama", 1)
    assert tokens[:switch] == greedy(old, PROMPT, switch)
    if mode == "finish":
        assert switch == 60
    elif mode == "continue" and switch < 60:
        assert tokens[switch:] == greedy(new, PROMPT + tokens[:switch], 60 - switch)
    assert Asked(engine, PROMPT, {}).answer()["output_ids"] == greedy(new, PROMPT, 8)


async def test_the_bearer_key_is_asked_for(folders):
    engine = Engine(EngineSettings(model_path=folders["llama"], dtype="float32", slots=2, secret="s3cret"))
    transport = httpx.ASGITransport(create_app(engine, Bootstrap("s3cret")))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        assert (await client.get("/health")).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert (await client.post("/generate", json={"input_ids": PROMPT}, headers=headers)).status_code == 401
            assert (await client.post("/pause_generation", json={}, headers=headers)).status_code == 401
        assert (await client.get("/model_info", headers={"Authorization": "Bearer s3cret"})).status_code == 200


def test_a_model_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        Engine(EngineSettings(model_path=tmp_path))


def test_a_folder_is_read_as_it_was_written(folders):
    state = make_model("qwen3").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_folder(folders["qwen3"]))
