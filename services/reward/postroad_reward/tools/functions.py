"""Tools from Python functions: the signature is the schema, the docstring the description, the value (JSON, or
text as it is) the result."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from postroad.config.tools import ToolSection
from postroad_reward.errors import GraderSettingsError
from postroad_reward.graders.function import resolve
from postroad_reward.tools.base import CallFailed, Tool, ToolSettingsError


def function_tool(section: ToolSection) -> Tool:
    """The recipe's own function, called in the service where it is async, else in a thread; it is trusted."""
    assert section.path is not None
    try:
        function = resolve(section.path)
    except GraderSettingsError as error:
        raise ToolSettingsError(f"tool {section.called!r}: {error}") from error
    threads = ThreadPoolExecutor(section.concurrency, thread_name_prefix=section.called)

    async def call(**arguments: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await function(**arguments)
        return await asyncio.get_running_loop().run_in_executor(threads, lambda: function(**arguments))

    return tool_of(section, function, lambda arguments, session: call(**arguments))


def tool_of(
    section: ToolSection,
    function: Callable[..., Any],
    call: Callable[[dict[str, Any], str], Awaitable[Any]],
) -> Tool:
    """A tool with the schema of `function`, done by `call`. Raises ToolSettingsError for a signature without a schema."""
    model = _model(section.called, function)

    async def checked(arguments: dict[str, Any], session: str) -> str:
        try:
            valid = model.model_validate(arguments)
        except ValidationError as error:
            faults = (f"{'.'.join(map(str, f['loc'])) or 'arguments'}: {f['msg']}" for f in error.errors())
            raise CallFailed("invalid_arguments", "; ".join(faults)) from error
        value = await call({name: getattr(valid, name) for name in type(valid).model_fields}, session)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    description = inspect.getdoc(function) or ""
    return Tool(
        section.called, description, _plain(model.model_json_schema()), checked, section.deadline_s, section.concurrency,
        section.output_characters,
    )  # fmt: skip


def _model(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    try:
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ToolSettingsError(f"tool {name!r}: its parameter {parameter} can't be given by name")
            kind = Any if parameter.annotation is parameter.empty else parameter.annotation
            fields[parameter.name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
        model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        model.model_json_schema()
    except (NameError, TypeError, ValueError, PydanticUserError) as error:
        raise ToolSettingsError(f"tool {name!r}: its signature has no JSON schema: {error}") from error
    return model


def _plain(schema: Any) -> Any:
    """A schema without pydantic's titles, which tell the model nothing."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _plain(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
