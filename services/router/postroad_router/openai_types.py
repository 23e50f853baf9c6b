"""What clients send to /v1/chat/completions and /v1/completions, as far as it is understood.

What would change the answer and is not implemented is refused, never ignored; what can't change it is ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from postroad_router.errors import ApiError
from postroad_router.generation import GenerationRequest
from postroad_router.parsers import Schemas

CODE_PARAMETERS = ("custom_logit_processor", "custom_logits_processor", "logits_processors", "custom_params")
MAX_CHOICES = 128
MAX_MESSAGES = 4096
MAX_TOKEN = 2**31 - 1
UNWATCHED_INTERVAL = 16  # tokens between chunks for a client that waits for the whole

Absent = Annotated[None, Field(description="Not implemented; refused unless it is null.")]
Zero = Annotated[float, Field(ge=0, le=0, description="Not implemented; refused unless it is 0.")]
Model = TypeVar("Model", bound=BaseModel)


class Open(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class StreamOptions(Open):
    include_usage: bool = False


class Function(Open):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Open):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(Open):
    name: str


class NamedTool(Open):
    type: Literal["function"] = "function"
    function: FunctionName


class JsonSchema(Open):
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Open):
    """What both kinds of completion take: OpenAI's fields, those that engines add to them, postroad's extensions."""

    model: str = Field(examples=["postroad"])
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN)
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int = Field(0, ge=0, le=MAX_TOKEN)
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MAX_TOKEN)]] = Field(default_factory=list, max_length=256)
    ignore_eos: bool = False

    minimum_version: int = Field(0, ge=0, le=MAX_TOKEN, description="No token from weights older than this version.")
    version: int | None = Field(None, ge=0, le=MAX_TOKEN, description="Tokens of this weight version only.")
    timeout_s: float | None = Field(None, gt=0)
    return_token_ids: bool = Field(False, description="Answer tokens, their log-probabilities and weight versions too.")
    routed_experts: bool = Field(False, description="With return_token_ids: the routed experts of a MoE model too.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        """How many alternatives are listed beside each token's log-probability; None: no log-probabilities."""
        return None

    @property
    def json_schema(self) -> str:
        return ""


AnyMessage = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"required": ["role"], "properties": {
        "role": {"type": "string", "examples": ["user"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
    }}),
]  # fmt: skip


class ChatRequest(SamplingFields):
    messages: list[AnyMessage] = Field(
        min_length=1, max_length=MAX_MESSAGES, examples=[[{"role": "user", "content": "Hello"}]]
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    functions: Absent = None
    function_call: Absent = None
    audio: Absent = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def variables(self) -> dict[str, Any]:
        """The chat template's own variables."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **self.chat_template_kwargs}

    @property
    def plain_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates take them."""
        return [tool.model_dump(exclude_unset=True) | {"type": "function"} for tool in self.tools or ()] or None

    @property
    def schemas(self) -> Schemas | None:
        """The parameters of the tools that may be called; None where none may."""
        if not self.tools or self.tool_choice == "none":
            return None
        return {tool.function.name: tool.function.parameters or {} for tool in self.tools}

    @property
    def forced(self) -> bool:
        """A tool has to be called."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def json_schema(self) -> str:
        """What the engine has to keep to: a call of the tools that have to be called, or the response format."""
        if self.forced:
            named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            calls = [
                {
                    "type": "object", "required": ["name", "parameters"],
                    "properties": {"name": {"const": name}, "parameters": schema},
                }
                for name, schema in (self.schemas or {}).items()
                if named in (None, name)
            ]  # fmt: skip
            return json.dumps({"type": "array", "minItems": 1, "items": {"anyOf": calls}})
        if self.response_format is None or self.response_format.type == "text":
            return ""
        wanted = self.response_format.json_schema
        return json.dumps(wanted.schema_ if wanted is not None else {"type": "object"})


class CompletionRequest(SamplingFields):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(examples=["Once upon a time"])
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Absent = None
    suffix: Absent = None

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class GenerateRequest(BaseModel):
    """SGLang's body, as far as the router looks at it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    input_ids: list[Annotated[int, Field(ge=0, le=MAX_TOKEN)]] | list[list[int]] | None = Field(
        None, examples=[[1, 2, 3]]
    )
    text: str | list[str] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = Field(None, examples=[{"max_new_tokens": 16}])
    stream: bool = False
    return_logprob: bool | list[bool] | None = None
    return_routed_experts: bool | None = None


class AbortRequest(Open):
    """SGLang's: of one request id, or of all."""

    rid: str = ""
    abort_all: bool = False


def read_chat(body: dict[str, Any]) -> ChatRequest:
    """The request. Raises ApiError 400 that names the parameter."""
    chat = validated(ChatRequest, body)
    if chat.top_logprobs and not chat.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if chat.forced and not chat.tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
    if isinstance(chat.tool_choice, NamedTool) and chat.tool_choice.function.name not in (chat.schemas or {}):
        message = f"tool_choice names {chat.tool_choice.function.name!r}, which is not among tools"
        raise ApiError(400, message, param="tool_choice", code="invalid_value")
    return chat


def validated(model: type[Model], body: dict[str, Any]) -> Model:
    """`body` as a `model`. Raises ApiError 400 that names the parameter."""
    refuse_code(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ApiError(
            400, f"{place}: {fault['msg']} (got {str(fault['input'])[:80]!r})", param=place, code="invalid_value"
        ) from error


def refuse_code(body: dict[str, Any]) -> None:
    """Raises ApiError 400 for parameters that an engine would execute."""
    sampling = body.get("sampling_params")
    places = [body, *(sampling if isinstance(sampling, list) else [sampling])]
    for name in CODE_PARAMETERS:
        if any(isinstance(place, dict) and place.get(name) is not None for place in places):
            raise ApiError(400, f"{name} carries code and is refused", param=name, code="forbidden_parameter")


def generation_request(
    asked: SamplingFields, prompt: list[int], max_length: int, timeout_s: float, choice: int = 0
) -> GenerationRequest:
    """The request of one choice. Raises ApiError 400 where prompt and answer do not fit into `max_length` tokens."""
    room = max_length - len(prompt)
    wanted = asked.max_new_tokens if asked.max_new_tokens is not None else max(room, 1)
    if wanted > room:
        raise ApiError(
            400, f"This model's maximum context length is {max_length} tokens. However, you requested "
            f"{len(prompt) + wanted} tokens ({len(prompt)} in the messages, {wanted} in the completion). "
            "Please reduce the length of the messages or completion.",
            param="messages" if isinstance(asked, ChatRequest) else "prompt", code="context_length_exceeded",
        )  # fmt: skip
    return GenerationRequest(
        prompt=tuple(prompt), max_new_tokens=wanted, min_new_tokens=min(asked.min_tokens, wanted),
        timeout_s=timeout_s if asked.timeout_s is None else min(asked.timeout_s, timeout_s),
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p, top_k=asked.top_k or -1, min_p=asked.min_p or 0.0,
        stop=asked.stop_strings, stop_token_ids=tuple(asked.stop_token_ids), ignore_eos=asked.ignore_eos,
        seed=None if asked.seed is None else asked.seed + choice, json_schema=asked.json_schema,
        top_logprobs=asked.logprobs_wanted or 0, routed_experts=asked.routed_experts,
        minimum_version=asked.minimum_version, version=asked.version,
        stream_interval=1 if asked.stream else UNWATCHED_INTERVAL,
    )  # fmt: skip
