"""One request for answers on its way: from messages to a prompt in tokens, and from engines' chunks to choices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from postroad_router.access import Caller
from postroad_router.choice import Choice
from postroad_router.conversation import Asked, plain_messages
from postroad_router.errors import ApiError
from postroad_router.families import THINK
from postroad_router.generation import GenerationRequest, TokenChunk
from postroad_router.merge import merged
from postroad_router.openai_types import MAX_CHOICES, ChatRequest, CompletionRequest, SamplingFields, generation_request
from postroad_router.parsers import Delta, make_parser
from postroad_router.parts import Parts
from postroad_router.sessions.session import Prompt, Session, anew
from postroad_router.template import TemplateError
from postroad_router.text import TextStream


@dataclass(frozen=True)
class Step:
    """What one chunk adds to one choice."""

    index: int
    choice: Choice
    chunk: TokenChunk
    deltas: list[Delta]


@dataclass(frozen=True)
class Place:
    """Where the answers of a request are kept."""

    session: Session
    asked: Asked
    prompt: Prompt


class Exchange:
    """`steps` generates all choices; they are whole at its end, and in their session where there is one."""

    def __init__(
        self, parts: Parts, asked: SamplingFields, prompts: Sequence[list[int]], choices: list[Choice],
        place: Place | None = None,
    ) -> None:  # fmt: skip
        limit_s = parts.dispatcher.settings.timeout_s
        self.asked, self.prompts, self.choices = asked, prompts, choices
        self._dispatcher, self._place = parts.dispatcher, place
        requests = [
            generation_request(asked, prompt, parts.max_length, limit_s, number)
            for prompt in prompts
            for number in range(asked.n)
        ]
        self._requests = requests if place is None else [_placed(request, place, parts) for request in requests]

    async def steps(self) -> AsyncGenerator[Step, None]:
        generations = [
            await self._recorded(index) or self._dispatcher.generate(request)
            for index, request in enumerate(self._requests)
        ]
        async with aclosing(merged(generations)) as chunks:
            async for index, chunk in chunks:
                choice = self.choices[index]
                deltas = choice.push(chunk)
                if chunk.finish and self._place is not None:
                    await self._place.session.record(self._place.asked, self._place.prompt, choice, index)
                yield Step(index, choice, chunk, deltas)

    async def _recorded(self, index: int) -> AsyncGenerator[TokenChunk, None] | None:
        """The answer that a router gave to this very request before it died, where the session has it."""
        chunk = None if self._place is None else await self._place.session.recorded(index)
        return None if chunk is None else _one(chunk)

    async def whole(self) -> None:
        async with aclosing(self.steps()) as steps:
            async for _ in steps:
                pass

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt) for prompt in self.prompts)
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _one(chunk: TokenChunk) -> AsyncGenerator[TokenChunk, None]:
    yield chunk


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


async def converse(parts: Parts, chat: ChatRequest, caller: Caller) -> Exchange:
    """The exchange of a chat request, in the caller's session where it names one."""
    check(parts, chat)
    asked = Asked(plain_messages(chat.messages), chat.plain_tools, chat.variables)
    place = None
    try:
        if caller.session:
            session = Session(parts.sessions, caller.session, caller.identity, caller.generation)
            await session.open()
            place = Place(session, asked, await session.prompt(asked, parts.junctions))
        prompt = await anew(asked, parts.junctions) if place is None else place.prompt
    except (TemplateError, UnicodeEncodeError) as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    reasoning = prompt.text.rstrip().endswith(THINK[0])
    choices = [_choice(parts, chat, prompt.tokens, reasoning) for _ in range(chat.n)]
    return Exchange(parts, chat, [prompt.tokens], choices, place)


async def count(parts: Parts, chat: ChatRequest) -> int:
    """Tokens of the prompt."""
    check(parts, chat)
    try:
        prompt = await anew(Asked(plain_messages(chat.messages), chat.plain_tools, chat.variables), parts.junctions)
    except (TemplateError, UnicodeEncodeError) as error:
        raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
    return len(prompt.tokens)


def _placed(request: GenerationRequest, place: Place, parts: Parts) -> GenerationRequest:
    """With what the session wants: its engine, its version, and the experts that it does not know yet."""
    experts = request.routed_experts or parts.capture
    return replace(
        request, session=place.session.name, routed_experts=experts, experts_known=place.prompt.experts_known if experts else 0,
        version=request.version if place.session.version is None else place.session.version,
    )  # fmt: skip


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
        prompt = await parts.vocabulary.encoded(prompt)
    if not prompt or not all(0 <= token < parts.model.vocabulary for token in prompt):
        message = f"prompt must have tokens, each from 0 to {parts.model.vocabulary - 1}"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return prompt


def _choice(parts: Parts, chat: ChatRequest, tokens: list[int], reasoning: bool) -> Choice:
    text = TextStream(parts.read, chat.stop_strings)
    parser = make_parser(parts.family, chat.schemas, reasoning, chat.forced)
    return Choice(tokens, parts.vocabulary, text, parser, chat.logprobs_wanted)
