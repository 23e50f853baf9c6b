"""Named errors of the engine; each message states the value and the remedy."""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors that the engine raises on purpose."""


class UnsupportedModelError(EngineError):
    """The model folder asks for an architecture or option that the embedded engine does not implement."""


class TensorError(EngineError):
    """A named tensor is missing, unknown, or has the wrong shape or dtype."""


class BadRequestError(EngineError):
    """A request that can't be served as it is written (HTTP 400)."""


class EngineBusyError(EngineError):
    """The waiting queue is full, or the engine is shutting down (HTTP 503 with Retry-After)."""


class HandoverError(EngineError):
    """A prompt's keys and values did not get from the prefill engine to the decode engine (HTTP 503)."""


class ActivationError(EngineError):
    """New weights could not be switched in; the served weights are unchanged."""
