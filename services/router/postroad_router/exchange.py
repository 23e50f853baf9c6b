"""One request for answers on its way: from messages to a prompt in tokens, and from engines' chunks to choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from postroad_router.choice import Choice
from postroad_router.conversation import Message, for_template, plain_messages
from postroad_router.errors import ApiError
from postroad_router.families import THINK
from postroad_router.generation import TokenChunk
from postroad_router.merge import merged
from postroad_router.openai_types import MAX_CHOICES, ChatRequest, CompletionRequest, SamplingFields, generation_request
from postroad_router.parsers import Delta, make_parser
from postroad_router.parts import Parts
from postroad_router.template import TemplateError
from postroad_router.text import TextStream

LONG_TEXT = 20_000  # characters from which on tokenising leaves the event loop


@dataclass(frozen=True)
class Step:
    """What one chunk adds to one choice."""

    index: int
    choice: Choice
    chunk: TokenChunk
    deltas: list[Delta]


class Exchange:
    """`steps` generates all choices; they are whole at its end."""

    def __init__(
        self, parts: Parts, asked: SamplingFields, prompts: Sequence[list[int]], choices: list[Choice]
    ) -> None:
        limit_s = parts.dispatcher.settings.timeout_s
        self.asked, self.prompts, self.choices = asked, prompts, choices
        self._dispatcher = parts.dispatcher
        self._requests = [
            generation_request(asked, prompt, parts.max_length, limit_s, number)
            for prompt in prompts
            for number in range(asked.n)
        ]

    async def steps(self) -> AsyncGenerator[Step, None]:
        generations = [self._dispatcher.generate(request) for request in self._requests]
        async with aclosing(merged(generations)) as chunks:
            async for index, chunk in chunks:
                choice = self.choices[index]
                yield Step(index, choice, chunk, choice.push(chunk))

    async def whole(self) -> None:
        async with aclosing(self.steps()) as steps:
            async for _ in steps:
                pass

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt) for prompt in self.prompts)
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def check(parts: Parts, asked: SamplingFields) -> None:
    """Raises ApiError where the model or the engines can't do what is asked."""
    if asked.model not in parts.names:
        raise ApiError(404, f"The model `{asked.model}` does not exist; here is {parts.names[0]}.",
                       param="model", code="model_not_found")  # fmt: skip
    if asked.routed_experts and not parts.model.experts:
        raise ApiError(400, "this model has no experts to return", param="routed_experts", code="invalid_value")
    if not asked.json_schema:
        return
    engines = parts.dispatcher.engines.pool.engines.values()
    if not engines:
        raise ApiError(503, "no engine is known yet; ask again later", code="no_engine", retry_after_s=1)
    if not all(engine.json_schema for engine in engines):
        param = "tool_choice" if getattr(asked, "forced", False) else "response_format"
        message = f"{param}: the engines of this run can't decode within a JSON schema; leave it to the prompt"
        raise ApiError(400, message, param=param, code="unsupported_parameter")


async def converse(parts: Parts, chat: ChatRequest) -> Exchange:
    """The exchange of a chat request."""
    check(parts, chat)
    text = render(parts, plain_messages(chat.messages), chat.plain_tools, chat.variables)
    tokens = await tokenise(parts, text)
    reasoning = text.rstrip().endswith(THINK[0])
    return Exchange(parts, chat, [tokens], [_choice(parts, chat, tokens, reasoning) for _ in range(chat.n)])


async def complete(parts: Parts, asked: CompletionRequest) -> Exchange:
    """The exchange of a text completion: no template, no parsing."""
    check(parts, asked)
    if not 0 < len(asked.prompts) * asked.n <= MAX_CHOICES:
        message = f"{len(asked.prompts)} prompts with n {asked.n} are not 1 to {MAX_CHOICES} choices"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    prompts = [await _prompt(parts, prompt) for prompt in asked.prompts]
    choices = [
        Choice(prompt, parts.vocabulary, TextStream(parts.vocabulary.decode, asked.stop_strings), None, asked.logprobs)
        for prompt in prompts
        for _ in range(asked.n)
    ]
    return Exchange(parts, asked, prompts, choices)


async def _prompt(parts: Parts, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt", code="invalid_value") from error
        prompt = await tokenise(parts, prompt)
    if not prompt or not all(0 <= token < parts.model.vocabulary for token in prompt):
        message = f"prompt must have tokens, each from 0 to {parts.model.vocabulary - 1}"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return prompt


def _choice(parts: Parts, chat: ChatRequest, tokens: list[int], reasoning: bool) -> Choice:
    text = TextStream(parts.read, chat.stop_strings)
    parser = make_parser(parts.family, chat.schemas, reasoning, chat.forced)
    return Choice(tokens, parts.vocabulary, text, parser, chat.logprobs_wanted)


def render(
    parts: Parts, messages: Sequence[Message], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
) -> str:
    """The prompt's text. Raises ApiError 400."""
    try:
        text = parts.template.render(
            for_template(messages, parts.family), tools=tools, variables={**parts.family.variables, **variables}
        )
        text.encode()
    except (TemplateError, UnicodeEncodeError) as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    return text


async def tokenise(parts: Parts, text: str) -> list[int]:
    if len(text) < LONG_TEXT:
        return parts.vocabulary.encode(text)
    return await asyncio.to_thread(parts.vocabulary.encode, text)
