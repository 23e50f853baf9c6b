"""The protocol over random crashes: publishers and readers whose every step of I/O may be their last."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from postroad.weights.protocol import LEASE_S, Reading, Shelf, Stamp, WeightsError, check_publication

BUCKETS = 3
PUBLISHERS, READERS = st.integers(0, 1), st.integers(0, 2)


def content(version: int, bucket: int) -> str:
    return f"v{version}b{bucket}"


@dataclass
class Store:
    """What survives every crash."""

    now: float = 0.0
    stamp: Stamp | None = None
    fence: int = 0
    leases: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # name: holder, token, end

    def acquire(self, name: str, holder: int) -> int | None:
        current = self.leases.get(name)
        if current is not None and current[2] > self.now and current[0] != holder:
            return None
        alive = current is not None and current[2] > self.now
        self.fence += not alive
        token = current[1] if alive and current else self.fence
        self.leases[name] = (holder, token, self.now + LEASE_S)
        return token


class Publisher:
    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.epoch: int | None = None
        self.shelf = Shelf()
        self.memory: dict[int, list[str]] = {}
        self.seen: Stamp | None = None
        self.frozen: int | None = None


class Reader:
    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.reading = Reading()
        self.staged: dict[int, str] = {}
        self.serving: Stamp | None = None
        self.source: Publisher | None = None


class Plane(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store, self.incarnations, self.history = Store(), 10, [-1]
        self.publishers = [Publisher(0), Publisher(1)]
        self.readers = [Reader(2), Reader(3), Reader(4)]
        self.readings: dict[int, int] = {}  # reader: version in its registered lease

    def incarnation(self) -> int:
        self.incarnations += 1
        return self.incarnations

    # ── publishers ───────────────────────────────────────────────────────────────────────────────────────────────
    @rule(p=PUBLISHERS)
    def take_lease(self, p: int) -> None:
        publisher = self.publishers[p]
        publisher.epoch = self.store.acquire("publisher", publisher.incarnation)

    @rule(p=PUBLISHERS)
    def look(self, p: int) -> None:
        self.publishers[p].seen = self.store.stamp

    @rule(p=PUBLISHERS, again=st.booleans())
    def freeze(self, p: int, again: bool) -> None:
        publisher = self.publishers[p]
        read = [v for r, v in self.readings.items() if self.lease_lives(r)]
        for version in publisher.shelf.idle(read) | (
            set() if publisher.shelf.has_room() else publisher.shelf.surplus()
        ):
            publisher.shelf.release(version)
            del publisher.memory[version]
        if publisher.frozen not in publisher.shelf.held:
            publisher.frozen = None  # an unpublished one made room
        newest = publisher.seen.version if publisher.seen else -1
        version = newest if again and newest >= 0 else newest + 1
        if version in publisher.shelf.held:
            return
        publisher.shelf.freeze(version)
        publisher.memory[version] = [content(version, bucket) for bucket in range(BUCKETS)]
        publisher.frozen = version

    @precondition(lambda self: any(p.frozen is not None and p.epoch is not None for p in self.publishers))
    @rule(p=PUBLISHERS)
    def publish(self, p: int) -> None:
        publisher = self.publishers[p]
        if publisher.frozen is None or publisher.epoch is None:
            return
        proposed, seen = Stamp(publisher.frozen, publisher.epoch), publisher.seen
        try:
            check_publication(seen, f"d{seen.version}" if seen else "", proposed, f"d{proposed.version}")
        except WeightsError:
            return
        if self.store.stamp != seen:  # compare-and-set
            return
        self.store.stamp = publisher.seen = proposed
        self.history.append(proposed.version)
        publisher.shelf.publish(proposed.version)
        publisher.frozen = None

    @rule(p=PUBLISHERS)
    def kill_publisher(self, p: int) -> None:
        self.publishers[p] = Publisher(self.incarnation())

    @rule(p=PUBLISHERS, bucket=st.integers(0, BUCKETS - 1))
    def flip_a_bit(self, p: int, bucket: int) -> None:
        for image in self.publishers[p].memory.values():
            image[bucket] = "flipped"

    # ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────
    def lease_lives(self, r: int) -> bool:
        lease = self.store.leases.get(f"reader-{r}")
        return lease is not None and lease[2] > self.store.now and lease[0] == self.readers[r].incarnation

    @rule(r=READERS)
    def begin(self, r: int) -> None:
        reader, stamp = self.readers[r], self.store.stamp
        token = self.store.acquire(f"reader-{r}", reader.incarnation)
        if stamp is None or token is None or reader.serving == stamp:
            return
        self.readings[r] = stamp.version
        expected = {bucket: content(stamp.version, bucket) for bucket in range(BUCKETS)}
        there = {bucket for bucket, value in reader.staged.items() if value == expected[bucket]}
        missing = {bucket: checksum for bucket, checksum in expected.items() if bucket not in there}
        reader.reading.begin(stamp, missing, token, self.store.now, 4 * LEASE_S)

    @rule(r=READERS, p=PUBLISHERS, bucket=st.integers(0, BUCKETS - 1))
    def read_a_bucket(self, r: int, p: int, bucket: int) -> None:
        reader, reading = self.readers[r], self.readers[r].reading
        if reading.state != "reading" or reading.stamp is None or bucket not in reading.missing:
            return
        image = self.publishers[p].memory.get(reading.stamp.version)
        if image is not None:
            reader.staged[bucket] = image[bucket]
            assert reading.accept(bucket, image[bucket]) == (image[bucket] == content(reading.stamp.version, bucket))

    @rule(r=READERS)
    def renew(self, r: int) -> None:
        reader = self.readers[r]
        token = self.store.acquire(f"reader-{r}", reader.incarnation)
        if reader.reading.state == "reading" and token is not None:
            try:
                reader.reading.renew(token, self.store.now)
            except WeightsError:
                assert reader.reading.state == "idle"

    @rule(r=READERS)
    def activate(self, r: int) -> None:
        reader = self.readers[r]
        stamp = reader.reading.stamp
        try:
            reader.reading.check(self.store.now)
            if stamp is not None:
                reader.reading.hand_out(stamp)
                reader.serving = stamp
        except WeightsError:
            return
        if reader.serving is not None and reader.serving == stamp:
            assert reader.staged == {bucket: content(stamp.version, bucket) for bucket in range(BUCKETS)}

    @rule(r=READERS)
    def kill_reader(self, r: int) -> None:
        self.readers[r] = Reader(self.incarnation())

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @rule(seconds=st.sampled_from([0.5, 2.0, LEASE_S + 1]))
    def wait(self, seconds: float) -> None:
        self.store.now += seconds

    @invariant()
    def versions_never_go_back(self) -> None:
        assert self.history == sorted(self.history)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert all(len(publisher.memory) <= 2 for publisher in self.publishers)

    @invariant()
    def the_published_snapshot_is_never_released(self) -> None:
        for publisher in self.publishers:
            assert publisher.shelf.published is None or publisher.shelf.published in publisher.memory

    def teardown(self) -> None:
        """Repaired, everything converges in one try: a dead publisher's and a dead reader's leases end by themselves."""
        self.store.now += LEASE_S + 1
        self.publishers = [Publisher(self.incarnation()), Publisher(self.incarnation())]
        self.take_lease(0)
        self.take_lease(1)
        assert self.publishers[0].epoch is not None and self.publishers[1].epoch is None, "two publishers at a time"
        self.look(0)
        self.freeze(0, True)
        self.publish(0)
        for r, reader in enumerate(self.readers):
            self.begin(r)
            for bucket in range(BUCKETS):
                self.read_a_bucket(r, 0, bucket)
            self.activate(r)
            assert reader.serving is not None and reader.serving.version == self.history[-1]


Plane.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestPlane = Plane.TestCase


def test_a_snapshot_under_read_stays_until_room_is_needed():
    shelf = Shelf()
    for version in (1, 2):
        shelf.freeze(version)
        shelf.publish(version)
    assert shelf.idle([1]) == set() and shelf.idle([]) == {1}
    assert not shelf.has_room() and shelf.surplus() == {1}
    with pytest.raises(WeightsError, match="release one before 3"):
        shelf.freeze(3)
    with pytest.raises(WeightsError, match="late joiners"):
        shelf.release(2)


def test_a_replaced_publisher_is_refused():
    with pytest.raises(WeightsError, match="replaced by another"):
        check_publication(Stamp(5, 2), "d5", Stamp(6, 1), "d6")
    check_publication(Stamp(5, 1), "d5", Stamp(5, 2), "d5")


def test_a_lapsed_lease_ends_the_read():
    reading = Reading()
    reading.begin(Stamp(1, 1), {0: "a"}, 7, 0.0, 60.0)
    with pytest.raises(WeightsError, match="lease lapsed"):
        reading.check(LEASE_S + 0.1)
    reading.begin(Stamp(1, 1), {0: "a"}, 7, 0.0, 60.0)
    with pytest.raises(WeightsError, match="its token was 7, now it is 8"):
        reading.renew(8, 1.0)
    with pytest.raises(WeightsError, match="not verified"):
        reading.hand_out(Stamp(1, 1))
