"""From chat messages to token ids and back: the model's chat template and its tokenizer, without transformers.

The template's environment is that of Hugging Face's `apply_chat_template`: sandboxed, immutable, with
raise_exception, strftime_now and tojson.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from postroad_router.errors import ApiError
from postroad_router.model import ModelFolderError, read_json

LONG_TEXT = 20_000  # characters
TOKEN_CHARACTERS = 256  # more than any token has
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateError(ValueError):
    """The chat template refuses these messages, or fails on them."""


class Generation(Extension):
    """`{% generation %}` marks what the assistant says; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_through"), [], [], body).set_lineno(line)

    def _through(self, caller: Any) -> str:
        return str(caller())


class ChatTemplate:
    """Renders messages as text. `special` are the tokenizer's named tokens, such as bos_token."""

    def __init__(self, text: str, special: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.special = special
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ModelFolderError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True, variables: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The prompt's text. `variables` are the template's own, such as enable_thinking. Raises TemplateError."""
        fixed = {"messages": messages, "tools": tools, "documents": None,
                 "add_generation_prompt": add_generation_prompt}  # fmt: skip
        try:
            return self._template.render({**self.special, **(variables or {}), **fixed})
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise TemplateError(f"the model's chat template does not take these messages: {error}") from error


class Vocabulary:
    """Token ids to text and back. Text is never re-tokenised: ids are what counts."""

    def __init__(self, tokenizer: Tokenizer, longest: int = 2**31) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        added = tokenizer.get_added_tokens_decoder()
        self.special: dict[int, str] = {token: entry.content for token, entry in added.items() if entry.special}
        self._bytes_of = _byte_alphabet() if _is_byte_level(tokenizer) else {}

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered prompt: special tokens are those that the template wrote."""
        text.encode()  # tokenizers panics on what is no Unicode
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    async def encoded(self, text: str) -> list[int]:
        """Like encode; a long text does not hold up the event loop. Raises ApiError 400 for one that can't fit."""
        if len(text) > self.longest * TOKEN_CHARACTERS:
            message = (
                f"{len(text)} characters are more than this model's maximum context length of {self.longest} tokens"
            )
            raise ApiError(400, message, code="context_length_exceeded")
        return self.encode(text) if len(text) < LONG_TEXT else await asyncio.to_thread(self.encode, text)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def reader(self, markup: frozenset[str]) -> Callable[[Sequence[int]], str]:
        """Like decode, with the special tokens of `markup` left in."""
        hidden = {token for token, content in self.special.items() if content not in markup}

        def read(tokens: Sequence[int]) -> str:
            return self.decode([token for token in tokens if token not in hidden], special=True)

        return read

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        name = self.tokenizer.id_to_token(token)
        if name is not None and self._bytes_of and all(character in self._bytes_of for character in name):
            return bytes(self._bytes_of[character] for character in name)
        return self.decode([token], special=True).encode()


def load_vocabulary(folder: Path, longest: int = 2**31) -> Vocabulary:
    """`longest` is the context length, in tokens. Raises ModelFolderError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFolderError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        return Vocabulary(Tokenizer.from_file(str(path)), longest)
    except Exception as error:
        raise ModelFolderError(f"{path} can't be read: {error}") from error


def load_template(folder: Path, override: str | None = None) -> ChatTemplate:
    """`override`, else chat_template.jinja, else the one in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    special = {name: _content(settings[name]) for name in SPECIAL if settings.get(name)}
    own = folder / "chat_template.jinja"
    text = override or (own.read_text() if own.exists() else settings.get("chat_template"))
    if isinstance(text, list):  # named templates
        text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
    if not isinstance(text, str):
        raise ModelFolderError(f"{folder} has no chat template; set model.chat_template in the recipe")
    return ChatTemplate(text, special)


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
