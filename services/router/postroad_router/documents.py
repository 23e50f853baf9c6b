"""The OpenAPI document: what FastAPI can't see, as bodies are read within bounds and answers are written as they come."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, create_model
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"
DESCRIPTION = """One address for the model. Every path under `/v1` also exists under `/sessions/<name>/v1`: the exact tokens
of its turns are kept there. A session may be named by the header `X-Postroad-Session` or behind the key
(`<key>:<session>`) instead. `X-Postroad-Minimum-Version` and `X-Postroad-Version` say which weights may answer;
`Idempotency-Key` makes a request safe to repeat."""


def _shape(name: str, **fields: Any) -> type[BaseModel]:
    """A model of an answer: these fields, all there, and maybe more."""
    given: Any = {field: (kind, ...) for field, kind in fields.items()}
    return create_model(name, __config__=ConfigDict(extra="allow"), **given)


Objects, Spans = list[dict[str, Any]], list[list[int]]
Error = _shape("Error", error=_shape("ErrorDetail", message=str, type=str, param=str | None, code=str | None))
AnthropicError = _shape("AnthropicError", type=str, error=_shape("AnthropicErrorDetail", type=str, message=str))
Usage = _shape("Usage", prompt_tokens=int, completion_tokens=int, total_tokens=int)
Head = {"id": str, "object": str, "created": int, "model": str, "usage": Usage}
Choice = {"index": int, "finish_reason": str, "logprobs": dict[str, Any] | None, "versions": Spans}
ChatMessage = _shape("ChatMessage", role=str, content=str | None)
ChatCompletion = _shape("ChatCompletion", **Head, choices=list[_shape("ChatChoice", **Choice, message=ChatMessage)])  # type: ignore[misc]
TextCompletion = _shape("TextCompletion", **Head, choices=list[_shape("TextChoice", **Choice, text=str)])  # type: ignore[misc]
AnthropicMessage = _shape(
    "AnthropicMessage", id=str, type=str, role=str, model=str, content=Objects, stop_reason=str,
    stop_sequence=str | None, usage=dict[str, int],
)  # fmt: skip
TokenCount = _shape("TokenCount", input_tokens=int)
OpenAIResponse = _shape("OpenAIResponse", id=str, object=str, status=str, output=Objects, usage=dict[str, Any] | None)
Generation = _shape("Generation", text=str, output_ids=list[int], meta_info=dict[str, Any])
ERRORS = {
    400: "The request is wrong; `param` says where.", 401: "No key, or a wrong one.", 403: "The key may not do this.",
    404: "There is no such model, session or response.", 409: "In conflict with what is there already.",
    413: "The body is too large.", 429: "Too many requests at a time; see Retry-After.",
    502: "The engines failed.", 503: "No engine, version or store is there yet; see Retry-After.", 504: "Out of time.",
}  # fmt: skip


_models: dict[str, type[BaseModel]] = {"Error": Error, "AnthropicError": AnthropicError}


def told(
    body: type[BaseModel] | None = None, answer: type[BaseModel] | None = None, kind: str = "application/json"
) -> Any:
    """A route's `openapi_extra`: the models of its body and of its answer with status 200."""
    named = {"x-body": body, "x-answer": answer}
    _models.update({model.__name__: model for model in named.values() if model is not None})
    return {key: model.__name__ for key, model in named.items() if model is not None} | {"x-kind": kind}


def document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI of all routes."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(title="postroad router", version="1", description=DESCRIPTION, routes=app.routes)
    for path, item in found["paths"].items():
        if path not in ("/livez", "/readyz"):
            for operation in item.values():
                _complete(operation, AnthropicError if path.startswith("/v1/messages") else Error)
    _, schemas = models_json_schema([(model, "validation") for model in _models.values()], ref_template=REFERENCE)
    bearer = {"type": "http", "scheme": "bearer"}
    found["components"] = {
        "schemas": schemas["$defs"],
        "securitySchemes": {"bearer": bearer, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}},
    }
    app.openapi_schema = found
    return found


def _complete(operation: dict[str, Any], error: type[BaseModel]) -> None:
    operation["security"] = [{"bearer": []}, {"key": []}]
    body, answer = operation.pop("x-body", None), operation.pop("x-answer", None)
    kind = operation.pop("x-kind", "")
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": _reference(body)}}}
    if answer is not None:
        content: dict[str, Any] = {"application/json": {"schema": _reference(answer)}}
        if "stream" in _models[body].model_fields:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation["responses"]["200"] = {
            "description": "The answer; events where `stream` is true.",
            "content": content,
        }
    operation["responses"].pop("422", None)
    for status, description in ERRORS.items():
        operation["responses"][str(status)] = {
            "description": description, "content": {"application/json": {"schema": _reference(error.__name__)}},
        }  # fmt: skip


def _reference(model: str) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model)}
