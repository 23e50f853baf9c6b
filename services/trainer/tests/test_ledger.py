"""The ledger's promises, by table and by random histories: order, credit, staleness, each group resolved once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad_trainer.ledger import FilterExhausted, Ledger, LedgerSettings, Member


def settings(**changes):
    return LedgerSettings(**{"steps": 3, "groups_per_step": 2, "group_size": 2, "staleness": 1, **changes})


def member(number, index, reward=0.0, version=0):
    return Member(number, index, number * 10 + index, f"g{number}.{index}", reward, version)


def fill(ledger, number, rewards=(0.0, 1.0), version=0):
    for index, reward in enumerate(rewards):
        assert ledger.add(member(number, index, reward, version)) == "accepted"


def issue(ledger):
    issued = []
    while (assignment := ledger.next_assignment()) is not None:
        issued.append(assignment)
    return issued


def test_credit_and_minimum_versions_follow_the_place_in_the_queue():
    ledger = Ledger(settings(steps=10))
    assert [(a.number, a.minimum_version) for a in issue(ledger)] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    for number in (0, 1):
        fill(ledger, number)
    assert ledger.take_batch().numbers == [0, 1]
    assert issue(ledger) == []  # credit comes with the published version, not with the batch
    ledger.complete_step(1)
    assert [(a.number, a.minimum_version) for a in issue(ledger)] == [(4, 1), (5, 1)]


def test_on_policy_asks_only_for_the_current_version():
    ledger = Ledger(settings(staleness=0))
    assert [a.minimum_version for a in issue(ledger)] == [0, 0]
    for number in (0, 1):
        fill(ledger, number)
    ledger.take_batch()
    ledger.complete_step(1)
    assert [a.minimum_version for a in issue(ledger)] == [1, 1]


def test_a_slow_group_is_not_overtaken():
    ledger = Ledger(settings())
    issue(ledger)
    for number in (1, 2, 3):
        fill(ledger, number)
    assert ledger.take_batch() is None
    fill(ledger, 0)
    assert ledger.take_batch().numbers == [0, 1]


def test_a_failed_group_is_dropped_in_its_turn_and_another_is_asked_for():
    ledger = Ledger(settings(steps=1, staleness=0))
    assert len(issue(ledger)) == 2
    ledger.add(member(0, 0))
    assert ledger.fail(0, "deadline")
    fill(ledger, 1)
    assert ledger.take_batch() is None
    assert [a.number for a in issue(ledger)] == [2]
    fill(ledger, 2)
    batch = ledger.take_batch()
    assert batch.numbers == [1, 2]
    assert [(d.number, d.reason, d.samples) for d in batch.dropped] == [(0, "deadline", ["g0.0"])]
    assert ledger.add(member(0, 1)) == "late"


def test_equal_rewards_are_filtered_and_counted_with_a_limit():
    ledger = Ledger(settings(steps=1, staleness=0, groups_per_step=1, filter="zero_std", max_filtered=2))
    for number in range(2):
        issue(ledger)
        fill(ledger, number, (1.0, 1.0))
        assert ledger.take_batch() is None
    issue(ledger)
    fill(ledger, 2, (1.0, 1.0))
    with pytest.raises(FilterExhausted, match="too easy or too hard"):
        ledger.take_batch()


def test_samples_of_groups_not_yet_asked_for_are_kept_for_their_turn():
    ledger = Ledger(settings(), version=1, next_number=2)
    fill(ledger, 3, version=1)
    assert ledger.add(member(1, 0)) == "late"
    assert [(a.number, a.complete) for a in issue(ledger)] == [(2, False), (3, True), (4, False), (5, False)]


def test_a_stale_group_is_never_trained():
    ledger = Ledger(settings(staleness=0), version=1, next_number=2)
    issue(ledger)
    fill(ledger, 2, version=0)
    fill(ledger, 3, version=1)
    assert ledger.take_batch() is None
    issue(ledger)
    fill(ledger, 4, version=1)
    assert [d.reason for d in ledger.take_batch().dropped] == ["stale"]


def test_duplicates_are_told():
    ledger = Ledger(settings())
    issue(ledger)
    fill(ledger, 0)
    assert ledger.add(member(0, 1)) == "duplicate"


@given(st.data(), st.integers(0, 3), st.integers(1, 3), st.sampled_from(["none", "zero_std"]))
def test_random_histories(data, staleness, groups_per_step, filter_name):
    """Whatever finishes in whatever order: batches in issue order, each group resolved once, staleness bounded,
    when an engine serves any version from the minimum to the current one."""
    chosen = settings(
        steps=6, staleness=staleness, groups_per_step=groups_per_step, filter=filter_name, max_filtered=1e9
    )
    ledger = Ledger(chosen)
    minimum: dict[int, int] = {}
    waiting: list[tuple[int, int]] = []
    resolved: list[int] = []
    while ledger.version < chosen.steps:
        for assignment in issue(ledger):
            minimum[assignment.number] = assignment.minimum_version
            waiting += [(assignment.number, index) for index in range(chosen.group_size)]
        assert ledger.outstanding <= (staleness + 1) * groups_per_step
        if waiting and data.draw(st.booleans()):
            number, index = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            if data.draw(st.integers(0, 19)) == 0:
                ledger.fail(number, "deadline")
            version = data.draw(st.integers(minimum[number], max(ledger.version, minimum[number])))
            ledger.add(member(number, index, float(data.draw(st.integers(0, 3)) > 0), version))
            continue
        batch = ledger.take_batch()
        if batch is None:
            if waiting:
                number, index = waiting.pop(0)
                ledger.add(member(number, index, float(index), max(ledger.version, minimum[number])))
            continue
        assert len(batch.groups) == groups_per_step
        assert not [d for d in batch.dropped if d.reason == "stale"]
        for members in batch.groups:
            assert ledger.version - min(m.oldest_version for m in members) <= staleness
        resolved += sorted([d.number for d in batch.dropped] + batch.numbers)
        ledger.complete_step(ledger.version + 1)
    assert resolved == sorted(set(resolved)) and ledger.outstanding == 0
    assert resolved == list(range(len(resolved)))
