"""Anthropic's Messages and OpenAI's Responses, each with its own official client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SAYS = '<think>\nwell\n</think>\n\nI look.\n<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def claude(mesh: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=mesh.url, api_key="mesh-key:talk", max_retries=0, timeout=20
    ) as client:
        yield client


TOOL = [{"name": "look", "description": "looks", "input_schema": SCHEMA}]


@pytest.mark.parametrize("stream", [False, True])
async def test_messages(mesh: Any, stub_engine: Any, claude: anthropic.AsyncAnthropic, stream: bool) -> None:
    engine = await mesh.add(stub_engine("e0", says=SAYS))

    async def ask(messages: list[Any]) -> Any:
        arguments: Any = {"model": "stub", "max_tokens": 100, "messages": messages, "tools": TOOL, "system": "be brief"}
        if not stream:
            return await claude.messages.create(**arguments)
        async with claude.messages.stream(**arguments) as events:
            kinds = [event.type async for event in events]
            assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "input_json" in kinds
            return await events.get_final_message()

    first = await ask(USER)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    thinking, text, use = first.content
    assert (thinking.thinking, text.text, use.name, use.input) == ("well", "I look.", "look", {"a": 1})
    assert first.stop_reason == "tool_use" and first.usage.output_tokens == len(SAYS) + 1
    engine.says = "done"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "42"}]}
    history = [*USER, {"role": "assistant", "content": [block.model_dump() for block in first.content]}]
    second = await claude.messages.create(
        model="stub",
        max_tokens=9,
        system="be brief",
        tools=TOOL,
        messages=[*history, {"role": "user", "content": [result]}],
    )  # type: ignore[call-overload]
    assert second.content[0].text == "done" and second.stop_reason == "end_turn"
    async with mesh.http() as client:
        turns = (await client.get("/sessions/talk")).json()["turns"]
    assert [turn["parent"] for turn in turns] == [None, 0], "the blocks come back as the same conversation"
    assert [message["role"] for message in turns[1]["messages"]] == ["tool", "assistant"]


async def test_messages_stop_counts_and_errors(mesh: Any, stub_engine: Any, claude: anthropic.AsyncAnthropic) -> None:
    await mesh.add(stub_engine("e0", says="one two three"))
    answer = await claude.messages.create(model="stub", max_tokens=50, messages=USER, stop_sequences=["two"])  # type: ignore[call-overload]
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "two", "one ")
    answer = await claude.messages.create(model="stub", max_tokens=3, messages=USER)  # type: ignore[call-overload]
    assert (answer.stop_reason, answer.content[0].text) == ("max_tokens", "one")
    counted = await claude.messages.count_tokens(model="stub", messages=USER)  # type: ignore[arg-type]
    assert counted.input_tokens == answer.usage.input_tokens
    for parameters, error in (
        ({"model": "gpt"}, anthropic.NotFoundError), ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, anthropic.BadRequestError),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            await claude.messages.create(**{"model": "stub", "max_tokens": 9, "messages": USER, **parameters})
        assert caught.value.body["type"] == "error"  # type: ignore[index]
    stranger = anthropic.AsyncAnthropic(base_url=mesh.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        await stranger.messages.create(model="stub", max_tokens=9, messages=USER)  # type: ignore[call-overload]
    await stranger.close()


FUNCTION = [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": False}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stateless", [False, True])
async def test_responses(mesh: Any, stub_engine: Any, stream: bool, stateless: bool) -> None:
    engine = await mesh.add(stub_engine("e0", says=SAYS))

    async def ask(**arguments: Any) -> Any:
        arguments = {"model": "stub", "tools": FUNCTION, "extra_headers": {"X-Postroad-Session": "talk"}, **arguments}
        if not stream:
            return await mesh.client.responses.create(**arguments, store=not stateless)
        async with mesh.client.responses.stream(**arguments, store=not stateless) as events:
            seen = [event async for event in events]
        assert [event.sequence_number for event in seen] == sorted({event.sequence_number for event in seen})
        assert seen[0].type == "response.created"
        return seen[-1].response

    first = await ask(input="hello", instructions="be brief")
    assert first.status == "completed" and [item.type for item in first.output] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert first.output_text == "I look." and first.output[0].content[0].text == "well"
    call = first.output[2]
    assert (call.name, json.loads(call.arguments)) == ("look", {"a": 1})
    engine.says = "done"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    if stateless:
        items = [{"role": "user", "content": "hello"}, *(item.model_dump() for item in first.output), result]
        second = await ask(input=items, instructions="be brief")
    else:
        second = await ask(input=[result], instructions="be brief", previous_response_id=first.id)
        assert (await mesh.client.responses.retrieve(second.id)).output_text == "done"
    assert second.output_text == "done"
    async with mesh.http() as client:
        turns = (await client.get("/sessions/talk")).json()["turns"]
    assert [turn["parent"] for turn in turns] == [None, 0]


async def test_responses_that_are_cut_or_wrong(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="one two three"))
    create = mesh.client.responses.create
    cut = await create(model="stub", input="hello", max_output_tokens=3)
    assert (
        cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens" and cut.output_text == "one"
    )
    with pytest.raises(openai.NotFoundError) as caught:
        await create(model="stub", input="hello", previous_response_id="resp_0")
    assert caught.value.code == "response_not_found"
    for parameters in (
        {"tools": [{"type": "web_search"}]}, {"input": [{"type": "image_generation_call"}]}, {"truncation": "auto"},
        {"text": {"format": {"type": "json_object"}}}, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            await create(**{"model": "stub", "input": "hello", **parameters})
    await mesh.client.responses.delete(cut.id)
    with pytest.raises(openai.NotFoundError):
        await mesh.client.responses.retrieve(cut.id)
