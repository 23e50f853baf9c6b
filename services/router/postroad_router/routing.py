"""Which engine gets a request: a decision without I/O or clock.

First the engine that has the session, then one that has the longest known prefix of the prompt, then the less loaded of
two drawn at random (Mitzenmacher 2001). Affinity ends where it costs more than it saves: see `worth_it`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from postroad_router.pool import Engine

BLOCK = 32  # tokens of a block of the prefix chain
PREFIXES = 1 << 16
SESSIONS = 1 << 16
HOLDERS = 4  # engines remembered of one prefix
SPILL = 1.5


@dataclass(frozen=True)
class Wanted:
    """What a request asks of an engine. `tokens` is what it may cost; `avoid` names engines that failed it already,
    used again only where there is no other; `whole` means that it can't be split into prefill and decode."""

    prompt: Sequence[int] = ()
    tokens: int = 0
    minimum_version: int = 0
    version: int | None = None
    session: str = ""
    avoid: frozenset[str] = frozenset()
    whole: bool = False

    def allows(self, version: int) -> bool:
        return version >= self.minimum_version and self.version in (None, version)

    def gone(self, engines: Iterable[Engine]) -> bool:
        """The one version that is wanted will not come again: every engine that serves is beyond it."""
        serving = [engine.version for engine in engines if engine.state == "ready"]
        return self.version is not None and bool(serving) and min(serving) > self.version


@dataclass(frozen=True)
class Route:
    """`engine` answers; where there is a `prefill` engine, that one computes the prompt for it."""

    engine: Engine
    prefill: Engine | None = None

    @property
    def engines(self) -> tuple[Engine, ...]:
        return (self.engine,) if self.prefill is None else (self.prefill, self.engine)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(engine.name for engine in self.engines)


class Prefixes:
    """Which engines have lately computed which prefixes: a chain of hashes, one a block; the oldest are forgotten."""

    def __init__(self, capacity: int = PREFIXES) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def longest(self, prompt: Sequence[int], names: frozenset[str]) -> tuple[tuple[str, ...], int]:
        """Of the engines `names` those that have the longest known prefix, and its length in tokens."""
        chain = _chain(prompt)
        for place in range(len(chain) - 1, -1, -1):
            holders = tuple(name for name in self._holders.get(chain[place], ()) if name in names)
            if holders:
                return holders, (place + 1) * BLOCK
        return (), 0

    def add(self, prompt: Sequence[int], name: str) -> None:
        for link in _chain(prompt):
            others = [other for other in self._holders.get(link, ()) if other != name]
            self._holders[link] = (name, *others[: HOLDERS - 1])
            self._holders.move_to_end(link)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)


def _chain(prompt: Sequence[int]) -> list[int]:
    links: list[int] = []
    link = 0
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        link = hash((link, *prompt[start : start + BLOCK]))
        links.append(link)
    return links


class Routing:
    """Remembers where sessions and prefixes are, in bounded memory. What it forgets costs speed alone."""

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self.prefixes = Prefixes()

    def choose(self, engines: Iterable[Engine], wanted: Wanted) -> Route | None:
        """The best route among engines that may serve; None where there is none. A pair comes before a mixed engine,
        but for a pair that has failed this request."""
        able = [engine for engine in engines if engine.well and wanted.allows(engine.version)]
        fresh = [engine for engine in able if engine.name not in wanted.avoid]
        for candidates in (fresh, able):
            route = None if wanted.whole else self._pair(candidates, wanted)
            if route is None and (mixed := [engine for engine in candidates if engine.role == "mixed"]):
                route = Route(self._affine(mixed, wanted))
            if route is not None:
                self._remember(route.prefill or route.engine, wanted)
                return route
        return None

    def _pair(self, engines: list[Engine], wanted: Wanted) -> Route | None:
        decoders = [engine for engine in engines if engine.role == "decode"]
        served = {(engine.version, engine.digest) for engine in decoders}
        prefillers = [
            engine for engine in engines if engine.role == "prefill" and (engine.version, engine.digest) in served
        ]
        if not prefillers:
            return None
        prefill = self._affine(prefillers, wanted)
        same = [
            decoder for decoder in decoders if (decoder.version, decoder.digest) == (prefill.version, prefill.digest)
        ]
        return Route(self._lighter(same), prefill)

    def _affine(self, engines: list[Engine], wanted: Wanted) -> Engine:
        if len(engines) == 1:
            return engines[0]
        by_name = {engine.name: engine for engine in engines}
        least = min(engines, key=lambda engine: engine.load)
        at = by_name.get(self._sessions.get(wanted.session, "")) if wanted.session else None
        if at is not None and worth_it(at, least, wanted.tokens, len(wanted.prompt)):
            return at
        holders, saved = self.prefixes.longest(wanted.prompt, frozenset(by_name))
        if holders:
            at = min((by_name[name] for name in holders), key=lambda engine: engine.load)
            if worth_it(at, least, wanted.tokens, saved):
                return at
        if wanted.session:  # other routers, who know as little of it, come to the same engine
            at = max(engines, key=lambda engine: xxhash.xxh3_64_intdigest(f"{wanted.session}:{engine.name}".encode()))
            if worth_it(at, least, wanted.tokens, 0):
                return at
        return self._lighter(engines)

    def _lighter(self, engines: list[Engine]) -> Engine:
        return min(self._draw.sample(engines, min(2, len(engines))), key=lambda engine: engine.load)

    def _remember(self, engine: Engine, wanted: Wanted) -> None:
        self.prefixes.add(wanted.prompt, engine.name)
        if wanted.session:
            self._sessions[wanted.session] = engine.name
            self._sessions.move_to_end(wanted.session)
            if len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)


def worth_it(at: Engine, least: Engine, tokens: int, saved: int) -> bool:
    """Whether an engine that saves the prefill of `saved` tokens is to be used although another has less to do: it may
    have half as much again, what is saved, and the request's own `tokens`."""
    return at.tokens <= SPILL * least.tokens + saved + tokens
