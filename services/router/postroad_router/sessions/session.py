"""One request within a session: which turn it goes on from, its prompt in tokens, and the turns that answer it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

import numpy as np

from postroad_router.choice import Choice
from postroad_router.conversation import Asked
from postroad_router.generation import TokenChunk, version_spans
from postroad_router.keys import Identity
from postroad_router.metrics import SESSION_TURNS
from postroad_router.sessions.junction import Junctions
from postroad_router.sessions.store import Record, SessionStore
from postroad_router.sessions.tree import ROOT, Turn, candidates, chain, reasoning_digest, tokens_of

TRIED_PATHS = 4


@dataclass(frozen=True)
class Prompt:
    """`tokens` are the first `kept` of turn `parent`'s path and then `new`. `text` is that of `new`."""

    tokens: list[int]
    text: str
    new: np.ndarray
    parent: int = ROOT
    follows: int = ROOT
    kept: int = 0
    since: int = 0  # messages that the parent knows
    experts_known: int = 0


@dataclass
class Session:
    """`version` is the only one that its turns may come from, where it is pinned. `generation` names what is
    generated now, where it may come again: its choices are recorded once."""

    store: SessionStore
    name: str
    caller: Identity
    generation: str
    version: int | None = None
    started: float = field(default_factory=time.time)

    async def open(self) -> None:
        """Raises ApiError for a session of another key, and for one that is full."""
        about = await self.store.about(self.name)
        about.check(self.name, self.caller)
        if self.store.is_full(about):
            raise self.store.full(self.name)
        self.version = about.version

    async def prompt(self, asked: Asked, junctions: Junctions) -> Prompt:
        """Append to the longest path that the messages extend and the template leaves as it is; else render anew.
        Raises TemplateError."""
        keys = chain(asked.messages, asked.tools, asked.variables)
        answers = [key for key, message in zip(keys, asked.messages, strict=True) if message["role"] == "assistant"]
        turns = await self.store.with_keys(self.name, answers)
        paths = candidates(turns, keys, asked.messages)
        for path in paths[:TRIED_PATHS]:
            prompt = await _appended(path, asked, junctions)
            if prompt is not None:
                SESSION_TURNS.labels("appended").inc()
                return prompt
        SESSION_TURNS.labels("rewritten" if paths else "begun").inc()
        return await anew(asked, junctions, paths[0][-1].number if paths else ROOT)

    async def recorded(self, index: int) -> TokenChunk | None:
        """The choice, whole, where it has been recorded already."""
        if not self.generation:
            return None
        number = await self.store.number(self.name, f"{self.generation}:{index}")
        turn = None if number is None else (await self.store.turns(self.name, [number])).get(number)
        if number is None or turn is None:
            return None
        record = await self.store.record(self.name, number, experts=True)
        versions = [version for start, end, version in record.versions for _ in range(start, end)]
        return TokenChunk(
            turn.tokens.tolist(), record.log_probabilities.tolist(), versions, record.engine, digests=record.digests,
            finish="length" if turn.finish == "length" else "stop", routed_experts=record.experts, unmatched=record.unmatched,
        )  # fmt: skip

    async def record(self, asked: Asked, prompt: Prompt, choice: Choice, index: int) -> int:
        """Write the turn that the choice of this index is; its number."""
        answer = choice.message
        experts = choice.experts
        covered = 0 if experts is None else prompt.experts_known + len(experts)
        turn = Turn(
            number=ROOT, parent=prompt.parent, follows=prompt.follows,
            key=chain([*asked.messages, answer], asked.tools, asked.variables)[-1], messages=len(asked.messages) + 1,
            kept=prompt.kept, prompt=prompt.new, tokens=np.asarray(choice.tokens, np.int32),
            finish=choice.reason or "stop", reasoning=reasoning_digest(answer), experts=covered,
            started=self.started, ended=time.time(),
        )  # fmt: skip
        root = prompt.parent == ROOT
        record = Record(
            messages=[*asked.messages[prompt.since :], answer],
            log_probabilities=np.asarray(choice.log_probabilities, np.float32), versions=version_spans(choice.versions),
            digests=choice.digests, engine=choice.engine,
            tools=asked.tools if root else None, variables=asked.variables if root else None,
            unmatched=choice.unmatched, experts_start=prompt.experts_known, experts=experts,
        )  # fmt: skip
        return await self.store.append(
            self.name, self.caller, f"{self.generation or uuid.uuid4().hex}:{index}", turn, record
        )


async def anew(asked: Asked, junctions: Junctions, follows: int = ROOT) -> Prompt:
    """The whole conversation rendered. Raises TemplateError."""
    text = junctions.render(asked.messages, asked.tools, asked.variables)
    tokens = await junctions.vocabulary.encoded(text)
    return Prompt(tokens, text, np.asarray(tokens, np.int32), follows=follows)


async def _appended(path: list[Turn], asked: Asked, junctions: Junctions) -> Prompt | None:
    turn = path[-1]
    tokens = tokens_of(path)
    thought = any(each.reasoning for each in path)
    answer, new = asked.messages[turn.messages - 1], asked.messages[turn.messages :]
    junction = junctions.after(answer, thought, junctions.vocabulary.special.get(int(tokens[-1]), ""), new, asked)
    if junction is None:
        return None
    kept = len(tokens) - junction.drop
    added = await junctions.vocabulary.encoded(junction.text)
    return Prompt(
        [*tokens[:kept].tolist(), *added], junction.text, np.asarray(added, np.int32), turn.number, turn.number, kept,
        turn.messages, min(turn.experts, kept),
    )  # fmt: skip
