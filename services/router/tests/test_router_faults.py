"""Engines that break: requests go on elsewhere, exactly; the sick are left alone until they are well."""

from __future__ import annotations

import asyncio
import base64
import ssl
import time
from typing import Any

import numpy as np
import openai
import pytest

from postroad.config import RecipeError
from postroad_router import connection
from postroad_router.engine_client import EngineClient
from postroad_router.errors import EngineFailure

MESSAGES = [{"role": "user", "content": "hello"}]
PROMPT_TOKENS = len("user\nhello\nassistant\n") + 3


async def ask(mesh: Any, **parameters: Any) -> Any:
    return await mesh.client.chat.completions.create(**{"model": "stub", "messages": MESSAGES, **parameters})


async def broken_and_whole(mesh: Any, stub_engine: Any, until: Any, **faults: Any) -> tuple[Any, Any]:
    """Two engines; the first is the least loaded, so that it is asked first."""
    first = await mesh.add(stub_engine("a", mark=1, **faults))
    second = await mesh.add(stub_engine("b", version=first.version + 1, mark=2, incremental=True))

    async def known() -> bool:
        return len(await mesh.known()) == 2

    await until(known)
    return first, second


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1, 7])
async def test_a_generation_goes_on_exactly(mesh: Any, stub_engine: Any, until: Any, stream: bool, after: int) -> None:
    first, second = await broken_and_whole(mesh, stub_engine, until, die_after=after)
    extra = {"return_token_ids": True, "routed_experts": True}
    answer = await ask(mesh, max_tokens=20, seed=4, stream=stream, extra_body=extra)
    if stream:
        chunks = [chunk async for chunk in answer]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        choice = chunks[-1].choices[0]
    else:
        choice = answer.choices[0]
        text = choice.message.content
    places = range(PROMPT_TOKENS, PROMPT_TOKENS + 20)
    assert text == "".join("abcdefghijklmnopqrstuvwxyz"[(place * 7 + 4) % 26] for place in places)
    parts = [(1, place) for place in places[:after]] + [(2, place) for place in places[after:]]
    assert choice.token_logprobs == pytest.approx([-0.01 * place - version for version, place in parts])
    assert choice.versions == ([[0, after, 1]] if after else []) + [[after, 20, 2]]
    assert set(choice.digests) == ({"1", "2"} if after else {"2"})
    assert len(second.requests[0]["input_ids"]) == PROMPT_TOKENS + after
    assert second.requests[0]["sampling_params"]["max_new_tokens"] == 20 - after
    assert choice.routed_experts["shape"] == [PROMPT_TOKENS + 19, 2, 2]
    assert choice.routed_experts["unmatched"] == list(range(after)), "the first engine's died with it"
    assert len(first.requests) == 1


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"garbage": b"{"}, {"garbage": b"[]"}, {"garbage": b'{"meta_info": {}}'},
              {"garbage": b'{"error": {"message": "lost"}}'}, {"lies": 0}],
)  # fmt: skip
async def test_a_bad_answer_is_asked_for_again(mesh: Any, stub_engine: Any, until: Any, fault: dict[str, Any]) -> None:
    first, _ = await broken_and_whole(mesh, stub_engine, until, healthy=False, **fault)
    choice = (await ask(mesh, max_tokens=5, extra_body={"return_token_ids": True, "minimum_version": 1})).choices[0]
    assert choice.engine == "b" and choice.versions == [[0, 5, 2]]
    assert (await mesh.known())["a"]["healthy"] is False
    await ask(mesh, max_tokens=2)
    assert len(first.requests) == 1, "a quarantined engine is not asked"


async def test_an_engine_that_died_with_the_last_token_is_not_asked_for_more(
    mesh: Any, stub_engine: Any, until: Any
) -> None:
    """The first engine gives all tokens up to the end and dies before it says that it is done."""
    first, second = await broken_and_whole(mesh, stub_engine, until, says="hi", garbage=None)
    original = first._chunk

    def without_finish(body: Any, tokens: Any, entries: Any, finish: Any) -> Any:
        if finish:
            first.die_after = 0
        return original(body, tokens, entries, None)

    first._chunk = without_finish
    choice = (await ask(mesh, extra_body={"return_token_ids": True, "routed_experts": True})).choices[0]
    assert choice.message.content == "hi" and choice.finish_reason == "stop" and choice.versions == [[0, 3, 1]]
    assert second.requests[0]["sampling_params"]["max_new_tokens"] == 0, "only the experts are asked for"
    experts = choice.routed_experts
    rows = np.frombuffer(base64.b64decode(experts["data"]), np.uint8).reshape(experts["shape"])
    assert rows.shape == (PROMPT_TOKENS + 2, 2, 2)


async def test_experts_that_do_not_fit_are_asked_for_again(mesh: Any, stub_engine: Any, until: Any) -> None:
    """All tokens are the first engine's; its experts lack a row each time, so that they are the second one's."""
    first, second = await broken_and_whole(mesh, stub_engine, until, loses_experts=True)
    extra = {"return_token_ids": True, "routed_experts": True}
    choice = (await ask(mesh, max_tokens=5, extra_body=extra)).choices[0]
    assert len(choice.token_ids) == 5 and choice.versions == [[0, 5, 1]]
    assert [body["sampling_params"]["max_new_tokens"] for body in first.requests + second.requests] == [5, 0, 0]
    assert choice.routed_experts["shape"] == [PROMPT_TOKENS + 4, 2, 2]
    rows = np.frombuffer(base64.b64decode(choice.routed_experts["data"]), np.uint8)
    assert set(rows.tolist()) == {2} and choice.routed_experts["unmatched"] == [0, 1, 2, 3, 4]


async def test_a_stop_string_across_the_seam_is_seen(mesh: Any, stub_engine: Any, until: Any) -> None:
    first, second = await broken_and_whole(mesh, stub_engine, until, says="one two three", die_after=5)
    second.says = "one two three"
    extra = {"return_token_ids": True, "routed_experts": True}
    choice = (await ask(mesh, stop="two", extra_body=extra)).choices[0]
    assert choice.message.content == "one " and choice.finish_reason == "stop"
    assert len(choice.token_ids) == 7 and choice.routed_experts["shape"][0] == PROMPT_TOKENS + 6
    assert len(first.requests) == 1


async def test_quarantine_ends_with_a_good_probe(mesh: Any, stub_engine: Any, until: Any) -> None:
    first, _ = await broken_and_whole(mesh, stub_engine, until, status=500, healthy=False)
    await ask(mesh, max_tokens=2)
    assert (await mesh.known())["a"]["healthy"] is False and not first.probes, "its weights are old"
    first.version = 2
    await mesh.register(first)
    await until(lambda: first.probes)
    assert (await mesh.known())["a"]["failures"] >= 2
    first.status, first.healthy = None, True

    async def admitted() -> bool:
        return bool((await mesh.known())["a"]["healthy"])

    await until(admitted, 20)
    choice = (await ask(mesh, max_tokens=2, extra_body={"return_token_ids": True})).choices[0]
    assert choice.engine == "a" and (await mesh.known())["a"]["failures"] == 0


async def test_a_new_process_of_the_name_is_used_at_once(mesh: Any, stub_engine: Any, until: Any) -> None:
    engine = await mesh.add(stub_engine("a", status=500, healthy=False))
    asking = asyncio.create_task(ask(mesh, max_tokens=2))
    await until(lambda: engine.requests)
    engine.status = None
    await mesh.register(engine, pid=2)
    assert (await asking).choices[0].finish_reason == "length"


async def test_the_only_engine_is_tried_again_where_it_was_busy(mesh: Any, stub_engine: Any, until: Any) -> None:
    engine = await mesh.add(stub_engine("a", status=503))
    asking = asyncio.create_task(ask(mesh, max_tokens=2))
    await until(lambda: engine.requests)
    assert (await mesh.known())["a"]["healthy"] is True
    engine.status = None
    assert (await asking).choices[0].finish_reason == "length"


async def test_attempts_are_bounded(start_router: Any, stub_engine: Any) -> None:
    mesh = await start_router(attempts=3)
    engines = [await mesh.add(stub_engine(f"e{place}", status=500, healthy=False)) for place in range(4)]
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(mesh, max_tokens=2)
    assert caught.value.status_code == 502 and caught.value.code == "engine_failed"
    assert sum(len(engine.requests) for engine in engines) == 3


async def test_a_request_that_engines_refuse_is_not_retried(mesh: Any, stub_engine: Any, until: Any) -> None:
    _, second = await broken_and_whole(mesh, stub_engine, until, status=400)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(mesh, max_tokens=2)
    assert caught.value.code == "engine_refused" and "told to fail" in caught.value.message
    assert not second.requests and (await mesh.known())["a"]["healthy"] is True


async def test_a_version_is_waited_for(mesh: Any, stub_engine: Any, until: Any) -> None:
    engine = await mesh.add(stub_engine("a", version=1))
    asking = asyncio.create_task(ask(mesh, max_tokens=2, extra_body={"minimum_version": 3, "return_token_ids": True}))
    assert (await ask(mesh, max_tokens=2)).choices[0].finish_reason == "length"
    assert len(engine.requests) == 1 and not asking.done()
    engine.version = 3
    await mesh.register(engine)
    assert (await asking).choices[0].versions == [[0, 2, 3]]


async def test_a_version_that_does_not_come(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("a", version=1))
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(mesh, extra_body={"minimum_version": 3, "timeout_s": 0.3})
    assert caught.value.status_code == 503 and caught.value.code == "version_unavailable"
    assert 0.25 < time.monotonic() - started < 5


async def test_no_engine_and_the_deadline(mesh: Any, stub_engine: Any) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(mesh, extra_body={"timeout_s": 0.2})
    assert caught.value.status_code == 503 and caught.value.code == "no_engine"
    await mesh.add(stub_engine("a", hold=asyncio.Event()))
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(mesh, extra_body={"timeout_s": 0.5})
    assert caught.value.status_code == 504 and caught.value.code == "timeout"


async def test_engines_stay_known_while_the_store_is_away(mesh: Any, stub_engine: Any, valkey: Any) -> None:
    await mesh.add(stub_engine("a", says="still here"))
    assert (await ask(mesh)).choices[0].message.content == "still here"
    valkey.kill()
    assert (await ask(mesh)).choices[0].message.content == "still here"
    valkey.start()
    assert (await ask(mesh)).choices[0].message.content == "still here"


async def test_a_silent_engine_is_waited_for_only_while_it_answers_probes(stub_engine: Any, until: Any) -> None:
    engine = stub_engine("a", says="x", hold=asyncio.Event())
    await engine.start()
    client = EngineClient("mesh-key", silence_s=0.05)
    body = {"input_ids": [3], "sampling_params": {"max_new_tokens": 3, "stop": []}, "stream": True}

    async def read() -> int:
        async with client.post(engine.url, body, time.monotonic() + 20) as response:
            count = 0
            while chunks := await response.chunks():
                count += len(chunks)
            return count

    patient = asyncio.create_task(read())
    await until(lambda: engine.probes >= 3)
    engine.hold.set()
    assert await patient == 2
    engine.hold, engine.healthy = asyncio.Event(), False
    with pytest.raises(EngineFailure, match="silent"):
        await read()
    await client.close()
    await engine.stop()


async def test_load_is_spread(mesh: Any, stub_engine: Any, until: Any) -> None:
    hold = asyncio.Event()
    engines = [await mesh.add(stub_engine(name, says="x", hold=hold)) for name in "abc"]

    async def known() -> bool:
        return len(await mesh.known()) == 3

    await until(known)
    asking = [asyncio.create_task(ask(mesh)) for _ in range(9)]
    await until(lambda: sum(len(engine.requests) for engine in engines) == 9)
    assert min(len(engine.requests) for engine in engines) >= 2
    hold.set()
    await asyncio.gather(*asking)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_passed_through_generation_is_retried_too(
    mesh: Any, stub_engine: Any, until: Any, stream: bool
) -> None:
    first, second = await broken_and_whole(mesh, stub_engine, until, status=500, healthy=False)
    body = {"input_ids": [4, 3], "sampling_params": {"max_new_tokens": 2, "stop": []}, "stream": stream}
    async with mesh.http() as client:
        answer = await client.post("/generate", json=body)
    assert answer.status_code == 200 and len(first.requests) == len(second.requests) == 1
    assert ('"engine": "b"' in answer.text) is not stream


async def test_one_version_alone_can_be_asked_for(mesh: Any, stub_engine: Any, until: Any) -> None:
    old, new = await broken_and_whole(mesh, stub_engine, until)
    for version, engine in ((1, old), (2, new)):
        for _ in range(2):
            choice = (await ask(mesh, max_tokens=2, extra_body={"version": version, "return_token_ids": True})).choices[
                0
            ]
            assert choice.engine == engine.name and choice.versions == [[0, 2, version]]
    named = {"X-Postroad-Version": "2"}
    choice = (await ask(mesh, max_tokens=2, extra_headers=named, extra_body={"return_token_ids": True})).choices[0]
    assert choice.engine == "b"
    old.version = 2
    await mesh.register(old)

    async def seen() -> bool:
        return (await mesh.known())["a"]["version"] == 2

    await until(seen)
    started = time.monotonic()
    with pytest.raises(openai.ConflictError) as caught:
        await ask(mesh, extra_body={"version": 1})
    assert caught.value.code == "version_gone" and time.monotonic() - started < 5, "there is nothing to wait for"


async def test_a_switch_within_a_generation_of_one_version(mesh: Any, stub_engine: Any, until: Any) -> None:
    """What came before the switch is kept, and another engine that still has the version goes on."""
    first, second = await broken_and_whole(mesh, stub_engine, until)
    second.version = 1
    await mesh.register(second)

    async def seen() -> bool:
        return (await mesh.known())["b"]["version"] == 1

    await until(seen)
    original = first._chunk

    def switching(body: Any, tokens: Any, entries: Any, finish: Any) -> Any:
        chunk = original(body, tokens, entries, finish)
        if len(tokens) > 3:
            chunk["meta_info"]["weight_versions"] = [[0, 3, 1], [3, len(tokens), 2]]
        return chunk

    first._chunk = switching
    choice = (await ask(mesh, max_tokens=8, extra_body={"version": 1, "return_token_ids": True})).choices[0]
    assert choice.versions == [[0, 8, 1]] and choice.engine == "b"
    assert len(second.requests[0]["input_ids"]) == PROMPT_TOKENS + 3


async def test_a_kept_connection_is_not_cut_by_the_answer_before(
    mesh: Any, stub_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "DRAIN_S", 0.05)
    engine = await mesh.add(stub_engine("a", pause_s=0.01))
    for tokens in (1, 30, 1, 30):
        await ask(mesh, max_tokens=tokens)
    assert len(engine.requests) == 4 and engine.aborted == 0


async def test_tls_by_two_settings(start_router: Any, stub_engine: Any, environment: Any) -> None:
    folder = environment.folder
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout key.pem -out cert.pem"
    named = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", *words.split(), *named]
    made = await asyncio.create_subprocess_exec(*command, cwd=folder, stderr=asyncio.subprocess.DEVNULL)
    assert await made.wait() == 0
    paths = {"tls_certificate": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}
    trusted = ssl.create_default_context(cafile=paths["tls_certificate"])
    mesh = await start_router(verify=trusted, **paths)
    await mesh.add(stub_engine("a", says="secret"))
    assert mesh.url.startswith("https://")
    async with mesh.http() as client:
        body = {"model": "stub", "messages": MESSAGES}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "secret"
    with pytest.raises(RecipeError, match="tls_certificate"):
        await start_router(**{**paths, "tls_key": str(folder / "none.pem")})
