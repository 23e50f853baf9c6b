"""Choosing engines: the decisions alone, over random pools."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from postroad_router.pool import Engine, Pool
from postroad_router.routing import BLOCK, HOLDERS, SPILL, Prefixes, Route, Routing, Wanted, worth_it

ROLES = st.sampled_from(["mixed", "prefill", "decode"])
PROMPT = tuple(range(100, 100 + 4 * BLOCK))


@st.composite
def engine(draw: Any, number: int) -> Engine:
    return Engine(
        f"e{number}", f"http://e{number}", version=draw(st.integers(0, 3)), digest="d", role=draw(ROLES),
        state=draw(st.sampled_from(["ready", "ready", "ready", "pulling"])), slots=draw(st.sampled_from([1, 8, 64])),
        tokens=draw(st.integers(0, 5000)), quarantined_until=draw(st.sampled_from([None, None, None, 1.0])),
    )  # fmt: skip


@st.composite
def engines(draw: Any) -> list[Engine]:
    return [draw(engine(number)) for number in range(draw(st.integers(0, 7)))]


@st.composite
def wanted(draw: Any) -> Wanted:
    return Wanted(
        prompt=draw(st.sampled_from([(), PROMPT, PROMPT[: BLOCK + 3], PROMPT[::-1]])), tokens=draw(st.integers(1, 500)),
        minimum_version=draw(st.integers(0, 3)), version=draw(st.sampled_from([None, None, 1, 2])),
        session=draw(st.sampled_from(["", "s", "t"])), avoid=draw(st.frozensets(st.sampled_from([f"e{n}" for n in range(7)]))),
        whole=draw(st.booleans()),
    )  # fmt: skip


def usable(known: list[Engine], ask: Wanted) -> list[Engine]:
    return [e for e in known if e.state == "ready" and e.quarantined_until is None and ask.allows(e.version)]


def pairs(able: list[Engine]) -> list[Route]:
    return [
        Route(decode, prefill)
        for prefill in able
        for decode in able
        if (prefill.role, decode.role) == ("prefill", "decode") and prefill.version == decode.version
    ]


@given(engines(), st.lists(wanted(), min_size=1, max_size=6), st.integers(0, 9))
def test_a_route_is_always_allowed_and_there_is_one_where_there_can_be(
    known: list[Engine], asks: list[Wanted], seed: int
) -> None:
    routing = Routing(random.Random(seed))
    for ask in asks:
        route = routing.choose(known, ask)
        able = usable(known, ask)
        possible = [Route(e) for e in able if e.role == "mixed"] + ([] if ask.whole else pairs(able))
        assert (route is None) == (not possible)
        if route is None:
            continue
        assert route in possible
        untried = [other for other in possible if not other.names & ask.avoid]
        assert not untried or not route.names & ask.avoid, "a failed engine is used while there is another"
        assert route.prefill is not None or ask.whole or not pairs([e for e in able if e.name not in ask.avoid])


@given(engines(), wanted(), st.integers(0, 9))
def test_affinity_ends_where_it_costs_more_than_it_saves(known: list[Engine], ask: Wanted, seed: int) -> None:
    """Whatever is remembered, the chosen engine is one of two drawn at random, or has little more to do than the least."""
    routing = Routing(random.Random(seed))
    routing.choose(known, ask)
    for one in known:
        one.tokens = random.Random(seed).randrange(5000)
    route = routing.choose(known, ask)
    mixed = [e for e in usable(known, ask) if e.role == "mixed" and e.name not in ask.avoid]
    if route is None or route.prefill is not None or not mixed:
        return
    least = min(mixed, key=lambda e: e.load)
    others = [e for e in mixed if e is not route.engine]
    lighter_of_two = any(route.engine.load < other.load for other in others) or not others
    assert worth_it(route.engine, least, ask.tokens, len(ask.prompt)) or lighter_of_two


def mixed(count: int, **fields: Any) -> list[Engine]:
    return [Engine(f"e{number}", f"http://e{number}", slots=8, **fields) for number in range(count)]


def test_a_session_stays_and_other_routers_agree_where_it_starts() -> None:
    known = mixed(5)
    first = {}
    for seed in range(3):
        routing = Routing(random.Random(seed))
        for number in range(50):
            route = routing.choose(known, Wanted((number,), 10, session=f"s{number}"))
            assert route is not None
            assert first.setdefault(number, route.engine) is route.engine
    assert len(set(first.values())) == 5, "sessions spread"


def test_a_session_follows_its_engine_and_leaves_it_when_it_is_overloaded() -> None:
    known, routing = mixed(4), Routing(random.Random(0))
    ask = Wanted(PROMPT, 10, session="s")
    home = routing.choose(known, ask)
    assert home is not None
    home.engine.tokens = len(PROMPT) + 10
    assert routing.choose(known, ask) == home
    home.engine.tokens += 1
    away = routing.choose(known, ask)
    assert away is not None and away != home
    home.engine.tokens = 0
    assert routing.choose(known, ask) == away, "it stays where its prefix is now"


def test_a_hot_prefix_spills_and_is_then_known_in_both_places() -> None:
    known, routing = mixed(3), Routing(random.Random(1))
    ask = Wanted(PROMPT, 50)
    served: dict[str, int] = {}
    for _ in range(60):
        route = routing.choose(known, ask)
        assert route is not None
        route.engine.tokens += 50
        served[route.engine.name] = served.get(route.engine.name, 0) + 1
        least = min(known, key=lambda e: e.load)
        assert route.engine.tokens - 50 <= SPILL * least.tokens + len(PROMPT) + 50 or len(served) == 3
    assert len(served) == 3 and min(served.values()) >= 10


def test_the_longest_prefix_wins() -> None:
    known, routing = mixed(3), Routing(random.Random(2))
    for name, size in (("e0", 2), ("e1", 3), ("e2", 1)):
        routing.prefixes.add(PROMPT[: size * BLOCK], name)
    assert routing.prefixes.longest(PROMPT, frozenset({"e0", "e1", "e2"})) == (("e1",), 3 * BLOCK)
    assert routing.prefixes.longest(PROMPT, frozenset({"e0", "e2"})) == (("e0",), 2 * BLOCK)
    route = routing.choose(known, Wanted(PROMPT, 1))
    assert route is not None and route.engine.name == "e1"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=80), st.integers(1, 20))
def test_prefixes_are_bounded_and_never_wrong_about_length(added: list[tuple[int, int]], capacity: int) -> None:
    prefixes = Prefixes(capacity)
    for start, number in added:
        prompt = tuple(range(start, start + 3 * BLOCK))
        prefixes.add(prompt, f"e{number}")
        assert len(prefixes) <= capacity
        names, size = prefixes.longest(prompt, frozenset(f"e{n}" for n in range(10)))
        assert size % BLOCK == 0 and size <= 3 * BLOCK and len(names) <= HOLDERS
        assert not names or names[0] == f"e{number}"


def test_two_choices_keep_queues_short() -> None:
    known, routing, draw = mixed(20), Routing(random.Random(3)), random.Random(4)
    for number in range(4000):
        route = routing.choose(known, Wanted((number,), 100))
        assert route is not None
        route.engine.tokens += draw.randrange(50, 150)
    tokens = [e.tokens for e in known]
    assert max(tokens) < 1.15 * min(tokens)


def test_a_version_that_is_gone_is_not_waited_for() -> None:
    known = mixed(2, version=5)
    assert Wanted(version=4).gone(known) and not Wanted(version=5).gone(known) and not Wanted(version=6).gone(known)
    assert not Wanted(version=4).gone([]) and not Wanted(minimum_version=9).gone(known)
    known[0].state = "pulling"
    assert Wanted(version=4).gone(known)
    known[1].version = 4
    known[1].quarantined_until = 7.0
    assert not Wanted(version=4).gone(known), "it may come back"


def test_a_sick_engine_comes_back_only_with_the_current_weights() -> None:
    pool = Pool()
    member = {"url": "http://e", "version": 1}
    pool.update({"a": member, "b": {**member, "url": "http://f"}})
    a = pool.engines["a"]
    pool.fail(a, 0.0)
    assert pool.due_probes(9.0) == [a]
    pool.update({"a": member, "b": {**member, "url": "http://f", "version": 2}})
    assert pool.due_probes(9.0) == []
    pool.update({"a": {**member, "version": 2}, "b": {**member, "url": "http://f", "version": 2}})
    assert pool.due_probes(9.0) == [a]
    pool.update({"a": member})
    assert pool.due_probes(9.0) == [a], "alone it is the best there is"
