"""W3C trace context in message headers, so that one prompt is followed from task to optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace

_tracer = trace.get_tracer("postroad")


def inject_context(headers: dict[str, str]) -> dict[str, str]:
    propagate.inject(headers)
    return headers


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[trace.Span]:
    with _tracer.start_as_current_span(name, attributes=attributes) as current:
        yield current


@contextmanager
def span_from_headers(name: str, headers: Mapping[str, str] | None) -> Iterator[trace.Span]:
    """A span whose parent is the publisher's."""
    context = propagate.extract(dict(headers or {}))
    with _tracer.start_as_current_span(name, context=context) as current:
        yield current


def trace_id() -> str:
    """The current trace id as 32 hex digits, or "" outside of a trace."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""
