"""Where spans go: an OTLP collector where OTEL_EXPORTER_OTLP_ENDPOINT names one, else nowhere (ids still travel)."""

from __future__ import annotations

import logging
import os

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

logger = logging.getLogger(__name__)


def set_up_tracing(service: str, run: str) -> None:
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    resource = Resource.create({"service.name": f"postroad-{service}", "postroad.run": run})
    # spans that go nowhere are not recorded: they have ids all the same
    provider = TracerProvider(resource=resource, sampler=None if endpoint else ALWAYS_OFF)
    if endpoint:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise RuntimeError(
                f"OTEL_EXPORTER_OTLP_ENDPOINT is {endpoint}, but the exporter is missing: "
                "pip install opentelemetry-exporter-otlp-proto-http"
            ) from error
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
