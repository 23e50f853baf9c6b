"""The weight plane's protocol, without I/O and without a clock: who may publish, what is kept, what may be activated.

    publisher   lease taken (epoch e) → frozen v → published v, under compare-and-set → superseded → released
    reader      serving u → reading v (lease token t) → verified v → handed out, once
                            └─ failed, deadline passed or lease lapsed: still serving u

`Publisher` and `Puller` are the I/O around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

LEASE_S = 5.0  # a publisher or reader that has not renewed its lease for so long is dead
KEPT_SNAPSHOTS = 2


class WeightsError(RuntimeError):
    """A version that can't be published, read or verified; the reader goes on with what it has."""


@dataclass(frozen=True, order=True)
class Stamp:
    """What the manifest is compared and set on: the version, and the fencing token of who published it."""

    version: int
    epoch: int = 0

    def __str__(self) -> str:
        return f"{self.version}.{self.epoch}"

    @classmethod
    def parse(cls, text: str) -> Stamp | None:
        """The stamp that `text` shows; None for "", which is no manifest."""
        version, _, epoch = text.partition(".")
        return cls(int(version), int(epoch or 0)) if version else None


def check_publication(current: Stamp | None, current_digest: str, proposed: Stamp, digest: str) -> None:
    """May `proposed` follow `current`? A restarted publisher may repeat the version with the same content. Raises
    WeightsError where a newer version, a newer publisher or another content is there already."""
    if current is None:
        return
    if proposed.epoch < current.epoch:
        raise WeightsError(f"this publisher (epoch {proposed.epoch}) was replaced by another (epoch {current.epoch})")
    if proposed.version < current.version:
        raise WeightsError(f"version {proposed.version} is older than the published {current.version}")
    if proposed.version == current.version and digest != current_digest:
        raise WeightsError(
            f"version {proposed.version} was published with digest {current_digest}, not {digest}: "
            "retraining from the log did not repeat it"
        )


class Shelf:
    """Which snapshots a publisher holds: the published one, at most one more, and never one without need."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.published: int | None = None

    def idle(self, read: Iterable[int]) -> set[int]:
        """Versions that may be released: superseded, and in no live reader's lease (`read`)."""
        return {version for version in self.held if self._superseded(version)} - set(read)

    def has_room(self) -> bool:
        return len(self.held) < KEPT_SNAPSHOTS

    def surplus(self) -> set[int]:
        """What must go, read or not, so that one more can be frozen."""
        return set(sorted(self.held - {self.published})[: len(self.held) - KEPT_SNAPSHOTS + 1])

    def freeze(self, version: int) -> None:
        if not self.has_room():
            raise WeightsError(f"snapshots {sorted(self.held)} are held already: release one before {version}")
        self.held.add(version)

    def publish(self, version: int) -> None:
        if version not in self.held:
            raise WeightsError(f"version {version} is not frozen")
        self.published = version

    def release(self, version: int) -> None:
        if version == self.published:
            raise WeightsError(f"version {version} is the published one: late joiners need it")
        self.held.discard(version)

    def _superseded(self, version: int) -> bool:
        return self.published is not None and version < self.published


State = Literal["idle", "reading", "verified"]


@dataclass
class Reading:
    """One reader's way from a manifest to tensors. All times are the caller's monotonic seconds."""

    state: State = "idle"
    stamp: Stamp | None = None
    missing: dict[int, str] = field(default_factory=dict)
    token: int = 0
    renewed: float = 0.0
    deadline: float = 0.0

    def begin(self, stamp: Stamp, missing: Mapping[int, str], token: int, now: float, deadline_s: float) -> None:
        """Start on `stamp`: `missing` has the checksum of every bucket that is not there already."""
        self.stamp, self.token, self.renewed, self.deadline = stamp, token, now, now + deadline_s
        self.missing = dict(missing)
        self.state = "reading" if missing else "verified"

    def accept(self, bucket: int, checksum: str) -> bool:
        """A bucket has arrived with this content. False: it is not what the manifest names, read it again."""
        if self.state != "reading" or self.missing.get(bucket) != checksum:
            return False
        del self.missing[bucket]
        if not self.missing:
            self.state = "verified"
        return True

    def renew(self, token: int, now: float) -> None:
        """The lease was extended. Another token means that it had lapsed: the snapshot may be gone."""
        if token != self.token:
            self.fail()
            raise WeightsError(f"the lease of this read lapsed: its token was {self.token}, now it is {token}")
        self.renewed = now

    def check(self, now: float) -> None:
        """Raises WeightsError where the read must be given up."""
        if self.state == "verified":
            return
        if self.state == "idle":
            raise WeightsError("this read was given up")
        fault = "deadline passed" if now > self.deadline else "lease lapsed" if now - self.renewed > LEASE_S else ""
        if fault:
            left = len(self.missing)
            self.fail()
            raise WeightsError(f"{fault} with {left} buckets missing")

    def fail(self) -> None:
        self.state, self.stamp, self.missing = "idle", None, {}

    def hand_out(self, stamp: Stamp) -> None:
        """The tensors of `stamp` are about to be staged in an engine. Raises WeightsError unless all were verified."""
        if self.state != "verified" or self.stamp != stamp:
            raise WeightsError(f"version {stamp.version} is not verified: nothing is handed out")
