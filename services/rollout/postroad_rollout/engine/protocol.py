"""The bodies of the HTTP interface, checked: each error is a sentence that names the field."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import BadRequestError
from .loop import ActivateMode, Engine, PauseMode
from .request import Request
from .sampling import SamplingParams

B = TypeVar("B", bound=BaseModel)
TokenIds = list[Annotated[int, Field(ge=0)]]
MAX_BATCH = 1024


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class GenerateBody(Body):
    """SGLang's GenerateReqInput, as far as it is served here."""

    input_ids: TokenIds | list[TokenIds] | None = None
    text: str | list[str] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = Field(default_factory=dict)
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = Field(default=-1, ge=-1)
    top_logprobs_num: int = Field(default=0, ge=0, le=64)
    return_text_in_logprobs: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = Field(default=0, ge=0)


class AbortBody(Body):
    rid: str = ""
    abort_all: bool = False


class PauseBody(Body):
    mode: PauseMode = "abort"


class UpdateFromDiskBody(Body):
    model_path: str
    weight_version: int = Field(ge=0)
    weight_digest: str = ""
    mode: ActivateMode = "continue"
    flush_cache: bool = True


class VersionBody(Body):
    new_version: int = Field(ge=0)
    abort_all_requests: bool = False


def check(kind: type[B], data: Any) -> B:
    """Validate a body or sampling parameters; None counts as not given."""
    if not isinstance(data, dict):
        raise BadRequestError(f"The {kind.__name__} is a {type(data).__name__}; send a JSON object.")
    data = {key: value for key, value in data.items() if value is not None}
    if "custom_logit_processor" in data:
        raise BadRequestError("custom_logit_processor runs code in the engine and is refused; remove it.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, kind.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(kind.model_fields)}."
            raise BadRequestError(f"{name} is not a parameter of the embedded engine; {hint}") from None
        value = f" (got {str(first['input'])[:80]!r})" if first["loc"] else ""
        raise BadRequestError(f"{name or 'value'}: {first['msg']}{value}.") from None


def make_requests(body: GenerateBody, engine: Engine, notify: Callable[[], None]) -> tuple[list[Request], bool]:
    """Turn a body into checked requests -> (requests, whether the answer is a list)."""
    prompts, batched = _prompts(body, engine)
    if not 1 <= len(prompts) <= MAX_BATCH:
        raise BadRequestError(f"input_ids holds {len(prompts)} prompts; send 1 to {MAX_BATCH}.")
    params = body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params] * len(prompts)
    rids = [body.rid] if isinstance(body.rid, str) and not batched else body.rid
    rids = rids or [uuid.uuid4().hex for _ in prompts]
    if isinstance(rids, str):
        rids = [f"{rids}_{i}" for i in range(len(prompts))]
    for name, items in (("sampling_params", params), ("rid", rids)):
        if len(items) != len(prompts):
            raise BadRequestError(f"{name} has {len(items)} entries for {len(prompts)} prompts; send one for each.")
    requests = []
    for rid, prompt, given in zip(rids, prompts, params, strict=True):
        checked = _check_prompt(body, engine, prompt, given)
        request = Request(rid, prompt, checked, 0, notify)
        request.seed = engine.seeds.getrandbits(63) if checked.sampling_seed is None else checked.sampling_seed
        request.stream, request.return_logprob = body.stream, body.return_logprob
        request.logprob_start, request.top_logprobs = body.logprob_start_len, body.top_logprobs_num
        request.return_experts, request.experts_start = body.return_routed_experts, body.routed_experts_start_len
        requests.append(request)
    return requests, batched


def _prompts(body: GenerateBody, engine: Engine) -> tuple[list[list[int]], bool]:
    if (body.input_ids is None) == (body.text is None):
        raise BadRequestError("Send either input_ids or text.")
    if body.text is not None:
        tokenizer = engine.tokenizer
        if tokenizer is None:
            raise BadRequestError(f"text needs a tokenizer and {engine.settings.model_path} has none; send input_ids.")
        texts = [body.text] if isinstance(body.text, str) else body.text
        return [tokenizer.encode(text).ids for text in texts], not isinstance(body.text, str)
    ids: list[Any] = body.input_ids or []
    batched = bool(ids) and isinstance(ids[0], list)
    return (ids if batched else [ids]), batched


def _check_prompt(body: GenerateBody, engine: Engine, prompt: list[int], given: dict[str, Any]) -> SamplingParams:
    limit, size = engine.max_length, engine.config.vocab_size
    params = check(SamplingParams, given)
    if not prompt:
        raise BadRequestError("input_ids is empty; send at least one token.")
    if max(prompt) >= size:
        raise BadRequestError(f"input_ids holds {max(prompt)}, outside the vocabulary of {size} tokens.")
    if "max_new_tokens" not in params.model_fields_set:
        room = max(1, min(params.max_new_tokens, limit - len(prompt)))
        params = params.model_copy(update={"max_new_tokens": room})
    if len(prompt) + params.max_new_tokens > limit:
        raise BadRequestError(
            f"input_ids has {len(prompt)} tokens and max_new_tokens is {params.max_new_tokens}: together more than "
            f"the engine's {limit} tokens. Shorten one or start the engine with a larger max_length."
        )
    if params.stop and engine.tokenizer is None:
        raise BadRequestError("stop needs a tokenizer and the model folder has none; send stop_token_ids.")
    if body.logprob_start_len >= len(prompt):
        raise BadRequestError(f"logprob_start_len {body.logprob_start_len} is not inside {len(prompt)} input_ids.")
    if body.return_routed_experts and not engine.config.moe_layers:
        raise BadRequestError(f"return_routed_experts: {engine.config.architecture} has no experts; remove it.")
    if body.routed_experts_start_len >= len(prompt):
        raise BadRequestError(f"routed_experts_start_len {body.routed_experts_start_len} is not inside input_ids.")
    return params
