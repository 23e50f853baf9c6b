"""Tool calls, reasoning, text completions: with the official client, against a stub engine that writes what it is told."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

MESSAGES = [{"role": "user", "content": "hello"}]
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
]  # fmt: skip
CALL = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'


async def ask(mesh: Any, **parameters: Any) -> Any:
    return await mesh.client.chat.completions.create(**{"model": "stub", "messages": MESSAGES, **parameters})


async def streamed(mesh: Any, **parameters: Any) -> tuple[dict[str, str], list[Any], str]:
    """The parts of a streamed answer, put together as an agent does; its tool calls; its finish reason."""
    texts = {"content": "", "reasoning_content": ""}
    calls: list[Any] = []
    finish = ""
    async for chunk in await ask(mesh, stream=True, **parameters):
        delta = chunk.choices[0].delta
        assert "<" not in (delta.content or ""), "markup must be held back"
        texts["content"] += delta.content or ""
        texts["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        calls += delta.tool_calls or []
        finish = chunk.choices[0].finish_reason or finish
    return texts, calls, finish


async def test_tool_calls_and_reasoning(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says=f"<think>\nwell\n</think>\n\nI look.\n{CALL}\n{CALL}"))
    answer = await ask(mesh, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    assert choice.message.reasoning_content == "well"
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"a": 1}, {"a": 1}]
    assert choice.message.tool_calls[0].function.name == "look" and len({c.id for c in choice.message.tool_calls}) == 2

    texts, calls, finish = await streamed(mesh, tools=TOOLS)
    assert texts == {"content": "I look.", "reasoning_content": "well"} and finish == "tool_calls"
    assert [(call.index, call.function.arguments) for call in calls] == [(0, '{"a": 1}'), (1, '{"a": 1}')]


async def test_without_tools_a_call_is_text(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says=CALL))
    for parameters in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = await ask(mesh, **parameters)
        assert answer.choices[0].message.content == CALL and answer.choices[0].message.tool_calls is None


async def test_a_tool_call_that_cannot_be_read_is_content(mesh: Any, stub_engine: Any) -> None:
    says = 'see <tool_call>\n{"name": "look", "argu</tool_call> so'
    await mesh.add(stub_engine("e0", says=says))
    answer = await ask(mesh, tools=TOOLS)
    assert answer.choices[0].message.content == says and answer.choices[0].finish_reason == "stop"


async def test_a_schema_goes_to_engines_that_keep_to_it(mesh: Any, stub_engine: Any, until: Any) -> None:
    engine = await mesh.add(stub_engine("e0", says='[{"name": "look", "parameters": {"a": 2}}]'), json_schema=True)
    await until(mesh.known)
    answer = await ask(mesh, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look"}})
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"a": 2}
    schema = json.loads(engine.requests[-1]["sampling_params"]["json_schema"])
    assert schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "look"}
    wanted = {"type": "object", "properties": {"x": {"type": "integer"}}}
    await ask(mesh, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": wanted}})
    assert json.loads(engine.requests[-1]["sampling_params"]["json_schema"]) == wanted


async def test_text_completions(mesh: Any, stub_engine: Any) -> None:
    await mesh.add(stub_engine("e0", says="<think>raw text"))
    prompts = ["one\n", "two\n"]
    answer = await mesh.client.completions.create(model="stub", prompt=prompts, n=2, logprobs=1, stop=["xt"])
    assert answer.object == "text_completion" and [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"<think>raw te"} and answer.usage.prompt_tokens == 8
    listed = answer.choices[0].logprobs
    assert "".join(listed.tokens).startswith("<think>raw te") and listed.text_offset[:3] == [0, 1, 2]
    assert listed.top_logprobs[0] == {"<": pytest.approx(listed.token_logprobs[0])}
    stream = await mesh.client.completions.create(
        model="stub", prompt=[4, 5, 3], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "<think>raw text"
    assert chunks[-1].usage.prompt_tokens == 3 and chunks[-2].choices[0].finish_reason == "stop"
    for bad in ([], [99_999], [[]], [-1]):
        with pytest.raises(openai.BadRequestError):
            await mesh.client.completions.create(model="stub", prompt=bad)
