"""The tree of a session's turns. Pure: no I/O, no clock.

A turn's key is a hash of all messages up to and with its answer, chained: equal keys mean equivalent conversations.
Equivalent are: no content, null and [] ; text and its parts; tool arguments that are the same JSON; any reasoning that
the client leaves out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np

from postroad_router.conversation import Message

ROOT = -1


@dataclass(frozen=True)
class Turn:
    """One generation. Its tokens are the first `kept` of its parent's, then `prompt`, then what was generated. `follows`
    is the turn that the messages go on from, also where the tokens do not. `messages` counts those up to and with its
    answer; `experts` the rows of routed experts that are known from the root to here."""

    number: int
    parent: int
    follows: int
    key: bytes
    messages: int
    kept: int
    prompt: np.ndarray
    tokens: np.ndarray
    finish: str
    reasoning: bytes = b""
    experts: int = 0
    started: float = 0.0
    ended: float = 0.0

    @property
    def length(self) -> int:
        """Tokens from the root to the end of this turn."""
        return self.kept + len(self.prompt) + len(self.tokens)

    def pack(self) -> bytes:
        data: bytes = msgpack.packb((
            self.parent, self.follows, self.key, self.messages, self.kept, self.prompt.astype("<i4").tobytes(),
            self.tokens.astype("<i4").tobytes(), self.finish, self.reasoning, self.experts,
            self.started, self.ended,
        ))  # fmt: skip
        return data

    @classmethod
    def unpack(cls, number: int, data: bytes) -> Turn:
        parent, follows, key, messages, kept, prompt, tokens, *rest = msgpack.unpackb(data)
        arrays = np.frombuffer(prompt, "<i4"), np.frombuffer(tokens, "<i4")
        return cls(number, parent, follows, key, messages, kept, *arrays, *rest)


def chain(messages: Sequence[Message], tools: Any, variables: Any) -> list[bytes]:
    """The key after each message; tools and the template's variables are part of it."""
    key = _digest(json.dumps([tools, variables], sort_keys=True).encode())
    keys = []
    for message in messages:
        key = _digest(key + canonical(message))
        keys.append(key)
    return keys


def canonical(message: Message) -> bytes:
    """Equal bytes for equivalent messages (in `conversation`'s spelling)."""
    calls = [
        (call["id"], call["function"]["name"], _canonical_json(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]
    parts = (message["role"], message["content"], message.get("tool_call_id"), message.get("name"), calls)
    return json.dumps(parts, ensure_ascii=False).encode(errors="surrogatepass")


def _canonical_json(text: str) -> Any:
    """Key order, white space and spelling of numbers do not matter; what is no JSON is itself."""
    try:
        value = json.loads(text or "{}", parse_float=Decimal, parse_int=Decimal, object_pairs_hook=_unique)
        return json.dumps(value, sort_keys=True, default=lambda number: ["number", str(number.normalize())])
    except (ValueError, ArithmeticError):
        return [text]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key twice")
    return value


def reasoning_digest(message: Message) -> bytes:
    text = message.get("reasoning_content")
    return _digest(text.strip().encode(errors="surrogatepass")) if text else b""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def candidates(turns: dict[int, Turn], keys: Sequence[bytes], messages: Sequence[Message]) -> list[list[Turn]]:
    """The paths, root first, that these messages extend: the longest and newest first. A path whose reasoning the client
    has changed is none of them."""
    found = [turn for turn in turns.values() if turn.messages <= len(keys) and keys[turn.messages - 1] == turn.key]
    paths = (
        path_to(turns, turn) for turn in sorted(found, key=lambda turn: (turn.messages, turn.number), reverse=True)
    )
    return [path for path in paths if path and all(_same_reasoning(turn, messages) for turn in path)]


def _same_reasoning(turn: Turn, messages: Sequence[Message]) -> bool:
    given = reasoning_digest(messages[turn.messages - 1])
    return not given or given == turn.reasoning


def path_to(turns: dict[int, Turn], turn: Turn) -> list[Turn]:
    """From the root to `turn`; empty where a turn between them is not known."""
    path = [turn]
    while path[-1].parent != ROOT:
        if path[-1].parent not in turns:
            return []
        path.append(turns[path[-1].parent])
    return path[::-1]


def tokens_of(path: Iterable[Turn]) -> np.ndarray:
    """All tokens of a path [T]."""
    tokens = np.zeros(0, np.int32)
    for turn in path:
        tokens = np.concatenate([tokens[: turn.kept], turn.prompt, turn.tokens])
    return tokens.astype(np.int32)


def leaves(turns: dict[int, Turn], keep: str) -> list[Turn]:
    """The ends of what is kept, newest first: `latest` alone, `all`, or `branches`: all but those that were tried
    again (a turn that follows the same one was begun after their end; what ran at the same time was meant so)."""
    parents = {turn.parent for turn in turns.values()}
    ends = sorted((turn for turn in turns.values() if turn.number not in parents), key=lambda turn: -turn.number)
    if keep == "latest":
        return ends[:1]
    if keep == "all":
        return ends
    begun: dict[tuple[int, bytes], float] = {}
    for turn in turns.values():
        begun[_place(turn)] = max(begun.get(_place(turn), 0.0), turn.started)
    return [turn for turn in ends if begun[_place(turn)] < turn.ended]


def _place(turn: Turn) -> tuple[int, bytes]:
    """The same for turns of which one may be another try of the other: first ones with other prompts are not."""
    return turn.follows, turn.prompt.tobytes() if turn.follows == ROOT else b""
