"""The body of POST /generate, checked at the boundary: SGLang's names, and errors that name the field."""

from __future__ import annotations

import asyncio
import difflib
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .engine import Engine
from .errors import BadRequestError
from .handover import Address
from .request import Request
from .sampling import SamplingParams

DEFAULT_NEW = 128
CODE_CARRYING = ("custom_logit_processor",)


class GenerateBody(BaseModel):
    """One prompt or a batch of them, as text or token ids."""

    model_config = ConfigDict(extra="forbid")

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = Field(default_factory=dict)
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = Field(default=0, ge=0, le=20)
    return_routed_experts: bool = False
    routed_experts_start_len: int = Field(default=0, ge=0)
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int] | None = None
    bootstrap_room: int | list[int] | None = None

    @property
    def batched(self) -> bool:
        given = self.text if self.input_ids is None else self.input_ids
        return isinstance(given, list) and (isinstance(self.text, list) or bool(given and isinstance(given[0], list)))


def read_body(raw: Any) -> GenerateBody:
    """Raises BadRequestError with the field's name and the nearest valid one."""
    if not isinstance(raw, dict):
        raise BadRequestError("the body must be a JSON object")
    for name in CODE_CARRYING:
        if raw.get(name) or (isinstance(raw.get("sampling_params"), dict) and raw["sampling_params"].get(name)):
            raise BadRequestError(f"{name} carries code and is refused")
    try:
        return GenerateBody.model_validate(raw)
    except ValidationError as error:
        raise BadRequestError(_explain(error, list(GenerateBody.model_fields))) from error


def requests_of(engine: Engine, body: GenerateBody, wake: asyncio.Event) -> list[Request]:
    """The engine's requests of a body. Raises BadRequestError."""
    if (body.text is None) == (body.input_ids is None):
        raise BadRequestError("give exactly one of text and input_ids")
    prompts = _prompts(engine, body)
    params = body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params] * len(prompts)
    rids = body.rid if isinstance(body.rid, list) else [body.rid] * len(prompts)
    if len(params) != len(prompts) or len(rids) != len(prompts):
        raise BadRequestError(f"{len(prompts)} prompts need as many sampling_params and rid, or one for all")
    addresses = _addresses(body, len(prompts))
    loop = asyncio.get_running_loop()

    def notify() -> None:
        loop.call_soon_threadsafe(wake.set)

    requests = [
        _request(engine, body, prompt, own, rid or uuid.uuid4().hex, notify)
        for prompt, own, rid in zip(prompts, params, rids, strict=True)
    ]
    for request, address in zip(requests, addresses, strict=True):
        request.address, request.exporting = address, engine.settings.role == "prefill"
        if request.exporting:
            if address is None:
                raise BadRequestError("a prefill engine needs bootstrap_host, bootstrap_port and bootstrap_room")
            request.params = request.params.model_copy(update={"max_new_tokens": 0, "min_new_tokens": 0})
    return requests


def _addresses(body: GenerateBody, count: int) -> list[Address | None]:
    """SGLang's bootstrap fields: one of each for a prompt, lists for a batch."""
    given = [body.bootstrap_host, body.bootstrap_port, body.bootstrap_room]
    if given == [None] * 3:
        return [None] * count
    if body.logprob_start_len >= 0:
        raise BadRequestError("logprob_start_len: a prompt that is handed over is not scored; ask a mixed engine")
    columns: list[list[Any]] = [value if isinstance(value, list) else [value] for value in given]
    if any(len(column) != count or None in column for column in columns):
        raise BadRequestError(f"{count} prompts need as many of bootstrap_host, bootstrap_port and bootstrap_room")
    return [Address(*address) for address in zip(*columns, strict=True)]


def _prompts(engine: Engine, body: GenerateBody) -> list[list[int]]:
    if body.input_ids is not None:
        given: list[Any] = body.input_ids
        return given if given and isinstance(given[0], list) else [given]
    if engine.tokenizer is None:
        raise BadRequestError("text needs a tokenizer, and the model folder has no tokenizer.json: send input_ids")
    texts = body.text if isinstance(body.text, list) else [str(body.text)]
    return [engine.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def _request(
    engine: Engine, body: GenerateBody, prompt: list[int], own: dict[str, Any], rid: str, notify: Any
) -> Request:
    params = read_params(own)
    if not prompt:
        raise BadRequestError("input_ids is empty; a prompt needs at least one token")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= engine.config.vocab_size:
        raise BadRequestError(
            f"input_ids holds {low if low < 0 else high}; ids go from 0 to {engine.config.vocab_size - 1}"
        )
    if "max_new_tokens" not in own:
        params = params.model_copy(update={"max_new_tokens": min(DEFAULT_NEW, max(engine.max_length - len(prompt), 1))})
    if len(prompt) + params.max_new_tokens > engine.max_length:
        raise BadRequestError(
            f"Requested token count exceeds the model's maximum context length of {engine.max_length} tokens: "
            f"{len(prompt)} of input_ids and {params.max_new_tokens} of max_new_tokens; shorten one of them"
        )
    if params.stop and engine.tokenizer is None:
        raise BadRequestError("stop needs a tokenizer, and the model folder has no tokenizer.json: use stop_token_ids")
    if body.logprob_start_len >= len(prompt):
        raise BadRequestError(f"logprob_start_len is {body.logprob_start_len}; the prompt has {len(prompt)} tokens")
    if body.return_routed_experts and not engine.config.moe_layers:
        raise BadRequestError("return_routed_experts: this model has no mixture-of-experts layers")
    return Request(
        rid=rid, prompt=prompt, params=params, notify=notify, stream=body.stream, return_logprob=body.return_logprob,
        seed=engine.default_seed(rid) if params.sampling_seed is None else params.sampling_seed,
        logprob_start=body.logprob_start_len, top_logprobs=body.top_logprobs_num,
        return_experts=body.return_routed_experts, experts_start=body.routed_experts_start_len,
    )  # fmt: skip


def read_params(own: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams.model_validate(own)
    except ValidationError as error:
        raise BadRequestError(f"sampling_params: {_explain(error, list(SamplingParams.model_fields))}") from error


def _explain(error: ValidationError, known: list[str]) -> str:
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, known, n=1)
        return f"unknown parameter {place}" + (f": did you mean {near[0]!r}?" if near else "")
    return (
        f"{place}: {fault['msg'].removeprefix('Value error, ')}"
        if place
        else fault["msg"].removeprefix("Value error, ")
    )
