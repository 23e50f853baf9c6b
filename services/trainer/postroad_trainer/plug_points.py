"""Functions of the user's own, by dotted path in the recipe. docs/customization.md lists where they go and what they are
given. They run in the trainer's process; what they raise names the plug-point."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


class PlugPointError(RuntimeError):
    """A function named in the recipe can't be found, or failed; the message names the key and the path."""


@functools.cache
def plug_point(key: str, path: str) -> Callable[..., Any]:
    """The function at `path`, named by the recipe's `key`. Raises PlugPointError now or when it is called."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlugPointError(f"{key}: {path} can't be found: {error}") from error
    if not callable(function):
        raise PlugPointError(f"{key}: {path} is a {type(function).__name__}, not a function")

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except Exception as error:
            raise PlugPointError(f"{key}: {path} failed: {type(error).__name__}: {error}") from error

    return call
