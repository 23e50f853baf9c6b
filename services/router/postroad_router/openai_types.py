"""What clients send to /v1/chat/completions, as far as it is understood, and how it becomes a GenerationRequest.

What would change the answer and is not implemented is refused, never ignored; what can't change it is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from postroad_router.errors import ApiError
from postroad_router.generation import GenerationRequest

CODE_PARAMETERS = ("custom_logit_processor", "custom_logits_processor", "logits_processors")
MAX_CHOICES = 128

UNWATCHED_INTERVAL = 16  # tokens between chunks for a client that waits for the whole


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Literal["text"]


class ChatRequest(BaseModel):
    """OpenAI's fields, then the sampling parameters that engines add to them, then postroad's extensions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    minimum_version: int = Field(0, ge=0)
    timeout_s: float | None = Field(None, gt=0)
    return_token_ids: bool = False
    routed_experts: bool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def read_chat(body: dict[str, Any]) -> ChatRequest:
    """The request. Raises ApiError 400 that names the parameter."""
    refuse_code(body)
    try:
        chat = ChatRequest.model_validate(body)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ApiError(
            400, f"{place}: {fault['msg']} (got {str(fault['input'])[:80]!r})", param=place, code="invalid_value"
        ) from error
    if chat.top_logprobs and not chat.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    return chat


def refuse_code(body: dict[str, Any]) -> None:
    """Raises ApiError 400 for parameters that an engine would execute."""
    sampling = body.get("sampling_params")
    places = [body, *(sampling if isinstance(sampling, list) else [sampling])]
    for name in CODE_PARAMETERS:
        if any(isinstance(place, dict) and place.get(name) is not None for place in places):
            raise ApiError(400, f"{name} carries code and is refused", param=name, code="forbidden_parameter")


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content as one text. Raises ApiError 400 for other content."""
    return [_plain(message, f"messages.{place}") for place, message in enumerate(messages)]


def _plain(message: dict[str, Any], place: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{place}.role must be a text such as user", param=place, code="invalid_value")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise ApiError(400, f"{place}.content has a part that is no text", param=place, code="invalid_value")
        content = "".join(str(part) for part in parts)
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise ApiError(400, f"{place}.content must be text or a list of parts", param=place, code="invalid_value")
    return {**message, "content": content}


def generation_request(
    chat: ChatRequest, prompt: list[int], max_length: int, timeout_s: float, choice: int = 0
) -> GenerationRequest:
    """The request of one choice. Raises ApiError 400 where prompt and answer do not fit into `max_length` tokens."""
    room = max_length - len(prompt)
    wanted = chat.max_new_tokens if chat.max_new_tokens is not None else max(room, 1)
    if wanted > room:
        raise ApiError(
            400, f"This model's maximum context length is {max_length} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the messages, {wanted} in the completion). "
            "Please reduce the length of the messages or completion.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip
    return GenerationRequest(
        prompt=tuple(prompt), max_new_tokens=wanted, min_new_tokens=min(chat.min_tokens, wanted),
        timeout_s=timeout_s if chat.timeout_s is None else min(chat.timeout_s, timeout_s),
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p, top_k=chat.top_k or -1, min_p=chat.min_p or 0.0,
        stop=chat.stop_strings, stop_token_ids=tuple(chat.stop_token_ids), ignore_eos=chat.ignore_eos,
        seed=None if chat.seed is None else chat.seed + choice,
        top_logprobs=chat.top_logprobs or 0, routed_experts=chat.routed_experts, minimum_version=chat.minimum_version,
        stream_interval=1 if chat.stream else UNWATCHED_INTERVAL,
    )  # fmt: skip
