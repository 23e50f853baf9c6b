"""The OpenAPI document, and whether the router keeps to it whatever is sent."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgpack
import pytest
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

FUZZ_S = 20.0
FUZZ = settings(
    max_examples=5, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # fmt: skip
ASKED_FOR = ("timeout", "version_unavailable")  # by timeout_s, version and minimum_version
KINDS = {"application/json", "text/event-stream", "application/msgpack"}


@schemathesis.serializer("application/msgpack")
def to_msgpack(_: Any, value: Any) -> bytes:
    return msgpack.packb(value, default=str)  # type: ignore[no-any-return]


@pytest.fixture
def engine_class(stub_engine: Any) -> Any:
    class StrictEngine(stub_engine):  # type: ignore[misc]
        """Says 400 to what is no request, as SGLang does."""

        async def generate(self, request: web.Request) -> web.StreamResponse:
            body = await request.json()
            sampling = body.get("sampling_params")
            if (
                not isinstance(sampling, dict)
                or type(sampling.get("max_new_tokens")) is not int
                or not body.get("input_ids")
            ):
                return web.json_response({"error": {"message": "no request"}}, status=400)
            return await super().generate(request)  # type: ignore[no-any-return]

    return StrictEngine


async def document(mesh: Any) -> dict[str, Any]:
    async with mesh.http() as client:
        return dict((await client.get("/openapi.json")).json())


async def test_the_document_is_complete(mesh: Any) -> None:
    found = await document(mesh)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate", "/sessions"):
        operation = found["paths"][path]["post"]
        assert operation["security"] and operation["requestBody"]["content"] and "400" in operation["responses"], path
    assert found["paths"]["/v1/models"]["get"]["responses"]["401"]
    chat = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["messages"]["examples"] and chat["temperature"]["anyOf"][0]["minimum"] == 0
    text = str(found)
    for name in [part.split("'")[0] for part in text.split("#/components/schemas/")[1:]]:
        assert name in found["components"]["schemas"], name


def fuzz(found: dict[str, Any], url: str, until_s: float) -> dict[str, int]:
    """Random requests that fit the document and such that do not, to each operation in turn; their number."""
    schema = schemathesis.openapi.from_dict(found)
    counts: dict[str, int] = {}
    operations = [result.ok() for result in schema.get_all_operations()]
    for seed in range(1000):
        for operation in operations:
            mode = GenerationMode.NEGATIVE if seed % 2 and operation.body else GenerationMode.POSITIVE

            @settings(
                max_examples=5,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                if seed and time.monotonic() > until_s:
                    return
                answer = case.call(base_url=url, session=None, headers={"Authorization": "Bearer mesh-key"}, timeout=30)
                label = f"{case.operation.label} {answer.status_code} {case.body!r} {answer.text[:300]}"
                assert answer.status_code < 500 or answer.json()["error"]["code"] in ASKED_FOR, label
                kind = "".join(answer.headers.get("content-type", ["application/json"]))
                assert kind.partition(";")[0] in KINDS, label
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], label
                counts[case.operation.label] = counts.get(case.operation.label, 0) + 1

            send()
        if time.monotonic() > until_s:
            break
    return counts


async def test_no_request_makes_it_fail(start_router: Any, engine_class: Any, until: Any) -> None:
    mesh = await start_router(timeout_s=0.5)
    await mesh.add(engine_class("e0", says="fine"))
    await until(mesh.known)
    found = await document(mesh)
    for schema in found["components"]["schemas"].values():
        if "examples" in schema.get("properties", {}).get("model", {}):
            schema["properties"]["model"] = {"enum": ["stub", "postroad"]}
    for path in ("/livez", "/readyz", "/metrics"):
        del found["paths"][path]
    counts = await asyncio.to_thread(fuzz, found, mesh.url, time.monotonic() + FUZZ_S)
    assert len(counts) == sum(len(path) for path in found["paths"].values()), counts
