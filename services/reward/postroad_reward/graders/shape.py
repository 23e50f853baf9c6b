"""How a response looks and how long it is: `format`, `length` and `json_schema`."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from pydantic import Field, field_validator, model_validator

from postroad_reward.graders.answers import AnswerSettings, without_fence
from postroad_reward.graders.base import Attempt, Grade, Grader, Settings


class FormatSettings(Settings):
    pattern: str = Field(
        r"<think>.*?</think>\s*<answer>.*?</answer>",
        description="Regular expression that the whole response must match; a dot matches line ends too.",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


def format_grade(attempt: Attempt, settings: FormatSettings) -> float:
    """1 where the response has the format, else 0; by itself the format of DeepSeek-R1 (2025)."""
    return float(re.fullmatch(settings.pattern, attempt.response.strip(), re.DOTALL) is not None)


class LengthSettings(Settings):
    max_tokens: int = Field(ge=1, description="Longest response (DAPO's L_max).")
    cache_tokens: int = Field(ge=1, description="Tokens before that over which the punishment grows (L_cache).")

    @model_validator(mode="after")
    def _fits(self) -> LengthSettings:
        if self.cache_tokens > self.max_tokens:
            raise ValueError(f"cache_tokens {self.cache_tokens} must not exceed max_tokens {self.max_tokens}")
        return self


def length_grade(attempt: Attempt, settings: LengthSettings) -> float:
    """0 up to L_max - L_cache tokens, then falling to -1 at L_max (DAPO's soft over-length punishment, eq. 13)."""
    over = attempt.tokens - (settings.max_tokens - settings.cache_tokens)
    return -min(max(over / settings.cache_tokens, 0.0), 1.0) or 0.0


class JsonSchemaSettings(AnswerSettings):
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="The JSON schema; by itself metadata.schema of the row."
    )


def json_schema_grade(attempt: Attempt, settings: JsonSchemaSettings) -> Grade:
    """1 where the answer, or what its one fenced block holds, is JSON that the schema allows, else 0."""
    schema = attempt.metadata.get("schema") if settings.schema_ is None else settings.schema_
    if not isinstance(schema, dict):
        raise ValueError("the json_schema grader needs its setting schema, or metadata.schema")
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    try:
        value = json.loads(without_fence(settings.answer(attempt.response) or ""))
    except (ValueError, RecursionError):
        return Grade(0.0, {"parsed": 0.0})
    return Grade(float(validator(schema).is_valid(value)), {"parsed": 1.0})


FORMAT = Grader("format", FormatSettings, format_grade)
LENGTH = Grader("length", LengthSettings, length_grade)
JSON_SCHEMA = Grader("json_schema", JsonSchemaSettings, json_schema_grade)
