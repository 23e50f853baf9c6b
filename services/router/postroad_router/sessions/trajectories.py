"""From a session's tree to what the trainer learns from: one trajectory for each end that is kept."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from postroad.messages import Task, Trajectory, VersionSpan
from postroad.messages.trajectory import trajectory_id
from postroad_router.conversation import Message
from postroad_router.errors import ApiError
from postroad_router.metrics import DRIFT
from postroad_router.sessions.drift import KINDS, Drift, find_drift
from postroad_router.sessions.junction import Junctions
from postroad_router.sessions.store import Record, SessionStore
from postroad_router.sessions.tree import Turn, leaves, path_to
from postroad_router.template import TemplateError, Vocabulary

Keep = Literal["latest", "branches", "all"]


@dataclass
class Line:
    """A path through the tree, put together. The arrays [T] are aligned; `trained` is 1 where the model wrote the token
    and no line before this one trains it."""

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    generated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    log_probabilities: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    versions: list[VersionSpan] = field(default_factory=list)
    experts: np.ndarray | None = None
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    engine: str = ""
    seconds: float = 0.0

    def add(self, turn: Turn, record: Record, fresh: bool) -> None:
        """The next turn; `fresh`: it is trained here."""
        wrote = np.concatenate([np.zeros(len(turn.prompt), np.uint8), np.ones(len(turn.tokens), np.uint8)])
        train = wrote * np.uint8(fresh)
        train[len(turn.prompt) + np.asarray(record.unmatched, dtype=np.int64)] = 0
        values = np.concatenate([np.zeros(len(turn.prompt), np.float32), record.log_probabilities])
        self.tokens = np.concatenate([self.tokens[: turn.kept], turn.prompt, turn.tokens]).astype(np.int32)
        self.generated = np.concatenate([self.generated[: turn.kept], wrote])
        self.trained = np.concatenate([self.trained[: turn.kept], train])
        self.log_probabilities = np.concatenate([self.log_probabilities[: turn.kept], values]).astype(np.float32)
        start = turn.kept + len(turn.prompt)
        self.versions = [
            span.model_copy(update={"end": min(span.end, turn.kept)})
            for span in self.versions
            if span.start < turn.kept
        ] + [
            VersionSpan(start=start + first, end=start + end, version=version, digest=record.digests.get(version, ""))
            for first, end, version in record.versions
        ]
        self._add_experts(record)
        self.messages += record.messages
        self.tools, self.variables = record.tools or self.tools, record.variables or self.variables
        self.engine, self.seconds = record.engine, self.seconds + turn.ended - turn.started

    def _add_experts(self, record: Record) -> None:
        known = 0 if self.experts is None else len(self.experts)
        if record.experts is None or record.experts_start > known:
            return
        before = [] if self.experts is None else [self.experts[: record.experts_start]]
        self.experts = np.concatenate([*before, record.experts])


class Collector:
    """Reads sessions back. `experts`: the model has some, and they are wanted."""

    def __init__(self, store: SessionStore, junctions: Junctions, vocabulary: Vocabulary) -> None:
        self._store, self._junctions, self._vocabulary = store, junctions, vocabulary

    async def lines(self, session: str, keep: Keep, experts: bool) -> list[tuple[list[Turn], Line]]:
        """The path and content of each end that is kept, newest first; a turn that several share is trained in the
        first."""
        about = await self._store.about(session)
        turns = await self._store.turns(session, range(about.turns))
        trained: set[int] = set()
        lines: list[tuple[list[Turn], Line]] = []
        for leaf in leaves(turns, keep):
            path, line = path_to(turns, leaf), Line()
            for turn in path:
                line.add(turn, await self._store.record(session, turn.number, experts), turn.number not in trained)
                trained.add(turn.number)
            lines.append((path, line))
        return lines

    async def trajectories(self, session: str, keep: Keep, task: Task, member: int) -> list[Trajectory]:
        """The first is the member's own trajectory; the others carry their turn's number in their id."""
        found = await self.lines(session, keep, task.features.routed_experts)
        return [
            await asyncio.to_thread(self._trajectory, task, member, path, line, f".{path[-1].number}" if number else "")
            for number, (path, line) in enumerate(found)
        ]

    def _trajectory(self, task: Task, member: int, path: list[Turn], line: Line, suffix: str) -> Trajectory:
        counts = Counter(drift.kind for drift in self.drift(line))
        for kind, count in counts.items():
            DRIFT.labels(kind).inc(count)
        rows = len(line.tokens) - 1
        experts = None if line.experts is None or len(line.experts) < rows else line.experts[:rows]
        if task.features.routed_experts and experts is None:
            raise ApiError(409, f"the routed experts of turn {path[-1].number} are not known: ask for them in every turn "
                           "(rollout.routed_experts)", code="experts_unknown")  # fmt: skip
        return Trajectory(
            run=task.run, id=trajectory_id(task.group, member) + suffix, member=member, task=task, tokens=line.tokens,
            loss_mask=line.trained, log_probabilities=line.log_probabilities * line.trained, versions=line.versions,
            routed_experts=experts,
            messages=line.messages, finish_reason=path[-1].finish, engine=line.engine, seconds=line.seconds,
            metrics={"turns": float(len(path)), **{f"drift_{kind}": float(counts[kind]) for kind in KINDS}},
        )  # fmt: skip

    def drift(self, line: Line) -> list[Drift]:
        """Against the canonical rendering; none where the template does not take these messages at all."""
        try:
            text = self._junctions.render(line.messages, line.tools, line.variables, prompt=False)
        except TemplateError:
            return []
        return find_drift(line.tokens, line.generated, self._vocabulary.encode(text), self._vocabulary)
