"""Putting one generation together from any number of engines that give up anywhere: over random ways to break."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad_router.errors import EngineFailure
from postroad_router.generation import GenerationRequest
from postroad_router.model import ModelFacts
from postroad_router.splice import Splice

PROMPT, NEW = (7, 8, 9), 6
LAYERS, MOE, TOP_K = 5, (1, 2), 2  # so many that no number of rows can be taken for another form's


def row(engine: int, position: int) -> np.ndarray:
    """What an engine would have routed position's token to: tells who computed which row."""
    return np.full((len(MOE), TOP_K), (engine * 10 + position) % 200)


def splice(experts: int = 200, **fields: Any) -> Splice:
    request = GenerationRequest(PROMPT, NEW, 10.0, routed_experts=True, **fields)
    return Splice(request, ModelFacts(50, frozenset({1}), experts, TOP_K, MOE, LAYERS), lambda tokens: "")


def chunks(body: dict[str, Any], engine: int, form: str, version: int = 3) -> list[dict[str, Any]]:
    """An engine's whole answer: `frames` as our engines stream it, `events` as SGLang does, with all layers or not."""
    start, known = body.get("routed_experts_start_len", 0), len(body["input_ids"])
    count = body["sampling_params"]["max_new_tokens"]
    made = []
    for number in range(1, count + 1) if count else [0]:
        over = number >= count
        meta: dict[str, Any] = {
            "completion_tokens": number, "weight_versions": [[0, number, version]], "weight_version": str(version),
            "output_token_logprobs": [[-0.5, 10 + known + number - 1, None]] if number else [],
            "finish_reason": {"type": "length"} if over else None,
        }  # fmt: skip
        if form == "frames":
            first = start if number <= 1 else known + number - 2
            rows = np.array([row(engine, at) for at in range(first, known + number - 1)], np.uint8)
            meta["routed_experts"] = {"dtype": "|u1", "shape": list(rows.shape), "data": rows.tobytes()}
        elif over:
            rows = np.array([row(engine, at) for at in range(start, known + number - 1 + ("one more" in form))], "<i4")
            if "layers" in form and len(rows):
                dense = np.full((len(rows), 1, TOP_K), 99, "<i4")
                rows = np.concatenate([dense, rows, dense, dense], 1)
            meta["routed_experts"] = base64.b64encode(rows.astype("<i4").tobytes()).decode()
        made.append({"output_ids": [10 + known + number - 1] if number else [], "meta_info": meta})
    return made


FORMS = st.sampled_from(["frames", "events", "events, layers", "events, one more"])


@given(st.lists(st.tuples(FORMS, st.integers(0, NEW)), max_size=4), FORMS, st.integers(0, 2))
def test_every_row_is_of_the_pass_that_sampled_or_its_token_is_named(
    broken: list[tuple[str, int]], last: str, known: int
) -> None:
    whole = splice(experts_known=known)
    sampled: dict[int, int] = {}
    for engine, (form, after) in enumerate([*broken, (last, 10**6)]):
        if whole.complete:
            break
        for chunk in chunks(whole.begin(), engine, form)[:after]:
            for _ in whole.accept(chunk, f"e{engine}").tokens:
                sampled[len(sampled)] = engine
            if whole.complete:
                break
        whole.break_off()
    assert whole.complete and whole.finish == "length"
    assert whole.tokens == [10 + len(PROMPT) + place for place in range(NEW)]
    experts = whole.routed_experts
    assert experts is not None and experts.dtype == np.uint8
    assert experts.shape == (len(PROMPT) + NEW - 1 - known, len(MOE), TOP_K)
    for token, engine in sampled.items():
        at = len(PROMPT) - 1 + token
        right = at < known or np.array_equal(experts[at - known], row(engine, at))
        assert right or token in whole.unmatched
        if token in whole.unmatched:
            assert any("events" in form for form, _ in broken), "our own engines' rows come with their tokens"


def test_many_experts_need_two_bytes() -> None:
    whole = splice(experts=300)
    for chunk in chunks(whole.begin(), 1, "events"):
        whole.accept(chunk, "e")
    assert whole.routed_experts is not None and whole.routed_experts.dtype == np.uint16


@pytest.mark.parametrize("fault", ["short", "beyond", "base64"])
def test_rows_that_make_no_sense_stay_missing(fault: str) -> None:
    whole = splice(experts=4 if fault == "beyond" else 200)
    *parts, last = chunks(whole.begin(), 1, "events")
    experts = last["meta_info"]["routed_experts"]
    last["meta_info"]["routed_experts"] = {"short": experts[:-64], "beyond": experts, "base64": "?"}[fault]
    for chunk in (*parts, last):
        whole.accept(chunk, "e")
    assert whole.finish == "length" and not whole.complete
    assert whole.begin()["sampling_params"]["max_new_tokens"] == 0


@pytest.mark.parametrize(("fields", "version", "allowed"), [
    ({"minimum_version": 3}, 3, True), ({"minimum_version": 3}, 2, False), ({"version": 3}, 3, True),
    ({"version": 3}, 4, False), ({}, 0, True),
])  # fmt: skip
def test_tokens_of_other_weights_than_asked_for_are_not_taken(fields: Any, version: int, allowed: bool) -> None:
    whole = splice(**fields)
    first, *_ = chunks(whole.begin(), 1, "frames", version)
    if allowed:
        assert whole.accept(first, "e").versions == [version]
        return
    with pytest.raises(EngineFailure, match="stale"):
        whole.accept(first, "e")
    assert whole.tokens == []
