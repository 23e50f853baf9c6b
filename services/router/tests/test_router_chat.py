"""The chat route with the official client, against one stub engine."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import openai
import pytest

MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
PROMPT_TOKENS = len("user\nhello\nassistant\n") + 3


def expected(count: int, seed: int = 0, start: int = PROMPT_TOKENS) -> str:
    return "".join("abcdefghijklmnopqrstuvwxyz"[(position * 7 + seed) % 26] for position in range(start, start + count))


async def ask(mesh: Any, **parameters: Any) -> Any:
    return await mesh.client.chat.completions.create(**{"model": "stub", "messages": MESSAGES, **parameters})


async def test_a_whole_completion(mesh: Any, stub_engine: Any) -> None:
    engine = await mesh.add(stub_engine("e0"))
    answer = await ask(
        mesh, max_completion_tokens=6, temperature=0.7, top_p=0.9, seed=3, extra_body={"top_k": 5, "min_p": 0.1}
    )
    assert answer.object == "chat.completion" and answer.model == "stub" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected(6, seed=3))
    assert choice.finish_reason == "length" and choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (PROMPT_TOKENS, 6, PROMPT_TOKENS + 6)
    sampling = engine.requests[0]["sampling_params"]
    assert sampling["temperature"] == 0.7 and sampling["top_p"] == 0.9 and sampling["sampling_seed"] == 3
    assert sampling["top_k"] == 5 and sampling["min_p"] == 0.1 and sampling["max_new_tokens"] == 6


async def test_the_end_token_is_no_text(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="fine"))
    answer = await ask(mesh)
    assert answer.choices[0].message.content == "fine" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("incremental", [False, True])
async def test_streaming(mesh: Any, stub_engine: Any, incremental: bool) -> None:
    await mesh.add(stub_engine("e0", says="a stream of text", incremental=incremental))
    stream = await ask(mesh, stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "a stream of text" and len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == len(text) + 1 and chunks[-1].choices == []
    assert len(chunks[-2].choices[0].token_ids) == len(text) + 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_cut_off(mesh: Any, stub_engine: Any, stream: bool) -> None:
    await mesh.add(stub_engine("e0", says="one two three"))
    answer = await ask(mesh, stop=["two", "zzz"], stream=stream)
    if stream:
        chunks = [chunk async for chunk in answer]
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        content, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (content, finish) == ("one ", "stop")


async def test_log_probabilities(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="hi"))
    answer = await ask(mesh, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["h", "i", "<|im_end|>"] and content[0].bytes == [104]
    assert content[0].logprob == pytest.approx(-0.01 * PROMPT_TOKENS - 1)
    assert [top.token for top in content[0].top_logprobs] == ["h", " "]
    streamed = [chunk async for chunk in await ask(mesh, logprobs=True, stream=True)]
    values = [e.logprob for c in streamed if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert values == pytest.approx([entry.logprob for entry in content])


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices_have_their_own_seeds(mesh: Any, stub_engine: Any, stream: bool) -> None:
    await mesh.add(stub_engine("e0"))
    answer = await ask(mesh, n=3, max_tokens=4, seed=10, stream=stream)
    texts = ["", "", ""]
    if stream:
        async for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens == 12
    assert texts == [expected(4, seed=10 + choice) for choice in range(3)]


async def test_exact_tokens_versions_and_experts(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="hi", version=7, mark=5))
    extra = {"return_token_ids": True, "routed_experts": True, "minimum_version": 7}
    choice = (await ask(mesh, extra_body=extra)).choices[0]
    assert len(choice.prompt_token_ids) == PROMPT_TOKENS and choice.token_ids[-1] == 2 and len(choice.token_ids) == 3
    assert choice.token_logprobs == pytest.approx([-0.01 * (PROMPT_TOKENS + i) - 7 for i in range(3)])
    assert choice.versions == [[0, 3, 7]] and choice.digests == {"7": "digest-7"} and choice.engine == "e0"
    experts = choice.routed_experts
    array = np.frombuffer(base64.b64decode(experts["data"]), experts["dtype"]).reshape(experts["shape"])
    assert array.shape == (PROMPT_TOKENS + 2, 2, 2) and array.dtype == np.uint8 and (array == 5).all()


async def test_models(mesh: Any) -> None:
    async with mesh.openai() as client:
        assert [model.id async for model in client.models.list()] == ["stub", "postroad"]
        assert (await client.models.retrieve("postroad")).id == "postroad"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt")


BAD = {
    "unknown model": ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
    "too long a prompt": ({"messages": [{"role": "user", "content": "x" * 300}]}, openai.BadRequestError,
                          "context_length_exceeded", "messages"),
    "ten megabytes": ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, openai.BadRequestError,
                      "context_length_exceeded", None),
    "a name that the template can't use": ({"messages": [{"role": "user", "content": 3}]}, openai.BadRequestError,
                                           "invalid_value", "messages.0.content"),
    "too long an answer": ({"max_tokens": 250}, openai.BadRequestError, "context_length_exceeded", "messages"),
    "temperature": ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
              openai.BadRequestError, "invalid_value", "messages.0.content"),
    "no role": ({"messages": [{"content": "x"}]}, openai.BadRequestError, "invalid_value", "messages.0"),
    "code": ({"extra_body": {"custom_logit_processor": "gASV"}}, openai.BadRequestError, "forbidden_parameter",
             "custom_logit_processor"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, openai.BadRequestError,
                              "invalid_value", "tools.0.function.name"),
    "a choice without tools": ({"tool_choice": "required"}, openai.BadRequestError, "invalid_value", "tool_choice"),
    "a schema that no engine keeps to": ({"response_format": {"type": "json_object"}}, openai.BadRequestError,
                                         "unsupported_parameter", "response_format"),
    "a penalty": ({"frequency_penalty": 0.5}, openai.BadRequestError, "invalid_value", "frequency_penalty"),
    "many messages": ({"messages": MESSAGES * 10_000}, openai.BadRequestError, "invalid_value", "messages"),
    "top without logprobs": ({"top_logprobs": 3}, openai.BadRequestError, "invalid_value", "top_logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_are_refused_in_openais_shape(mesh: Any, stub_engine: Any, until: Any, name: str) -> None:
    parameters, kind, code, param = BAD[name]
    engine = await mesh.add(stub_engine("e0"))
    await until(mesh.known)
    with pytest.raises(kind) as caught:
        await ask(mesh, **parameters)
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert caught.value.body["message"] and not engine.requests


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
async def test_bodies_that_are_no_object(mesh: Any, body: bytes) -> None:
    async with mesh.http() as client:
        answer = await client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


async def test_text_that_is_no_text(mesh: Any) -> None:
    body = b'{"model": "stub", "messages": [{"role": "user", "content": "\\ud800"}]}'
    async with mesh.http() as client:
        answer = await client.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


async def test_strangers_are_refused(mesh: Any, stub_engine: Any) -> None:
    engine = await mesh.add(stub_engine("e0"))
    async with mesh.openai("wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="stub", messages=MESSAGES)
    assert caught.value.code == "invalid_api_key" and not engine.requests
    async with mesh.http("wrong") as client:
        for path in ("/engines", "/metrics", "/v1/models", "/nothing"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/livez")).status_code == (await client.get("/readyz")).status_code == 200


async def test_unknown_addresses_and_metrics(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="x"))
    await ask(mesh)
    async with mesh.http() as client:
        missing = await client.get("/v1/nothing")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "unknown_url"
        assert "postroad_router_requests_total" in (await client.get("/metrics")).text


async def test_past_the_limit_requests_are_told_to_come_again(start_router: Any, stub_engine: Any, until: Any) -> None:
    mesh = await start_router(concurrency=2)
    hold = asyncio.Event()
    engine = await mesh.add(stub_engine("e0", says="x", hold=hold))
    running = [asyncio.create_task(ask(mesh)) for _ in range(2)]
    await until(lambda: len(engine.requests) == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(mesh)
    assert caught.value.response.headers["Retry-After"] == "1" and caught.value.code == "too_many_requests"
    hold.set()
    await asyncio.gather(*running)
    assert (await ask(mesh)).choices[0].message.content == "x"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_ends_the_engines_work(
    mesh: Any, stub_engine: Any, until: Any, stream: bool, begun: bool
) -> None:
    hold = None if begun else asyncio.Event()
    engine = await mesh.add(stub_engine("e0", says="x" * 200, pause_s=0.05, hold=hold))
    asking = asyncio.create_task(ask(mesh, stream=stream))
    await until(lambda: engine.requests)
    if stream and begun:
        answer = await asking
        await anext(aiter(answer))
        await answer.close()
    else:
        asking.cancel()
    await until(lambda: engine.aborted == 1)

    async def idle() -> bool:
        return (await mesh.known())["e0"]["requests"] == 0

    await until(idle)
    assert len(engine.requests) == 1, "nothing is asked again for a client that is gone"


async def test_generate_is_passed_through(mesh: Any, stub_engine: Any) -> None:
    engine = await mesh.add(stub_engine("e0", says="hi"))
    body = {"input_ids": [4, IDS_NEWLINE], "sampling_params": {"max_new_tokens": 4, "stop": []}, "anything": 1}
    async with mesh.http() as client:
        whole = (await client.post("/generate", json=body)).json()
        assert whole["meta_info"]["engine"] == "e0" and engine.requests[0]["anything"] == 1
        streamed = (await client.post("/generate", json={**body, "stream": True})).text
        assert streamed.count("data: ") == 4 and streamed.endswith("data: [DONE]\n\n")
        old = await client.post("/generate", json=body, headers={"X-Postroad-Version": "0"})
        assert old.status_code == 409 and old.json()["error"]["code"] == "version_gone"
        assert (await client.post("/abort_request", json={"rid": "x"})).json() == {"engines": 1}
        assert engine.requests[-1] == {"rid": "x", "abort_all": False}
        assert (await client.post("/abort_request", json={})).status_code == 400
        code = {**body, "sampling_params": {"custom_logit_processor": "gASV"}}
        assert (await client.post("/generate", json=code)).json()["error"]["code"] == "forbidden_parameter"


IDS_NEWLINE = 3
