"""Which groups are asked for, which are here, and which make the next batch. A pure state machine: no I/O, no clock.

Groups are numbered in issue order and resolved in that order alone: a batch is the next groups that are complete and
kept. So no group is overtaken for being slow (no length bias), and the resolved groups are always a prefix of the
numbers, which is all that a restart needs to know.

Staleness (design §4.3): a group at place p of the open ones is trained no later than p // groups_per_step versions
after the current one, because every step takes exactly groups_per_step groups. Issuing only while
p < (staleness + 1) * groups_per_step, with `minimum_version = current + p // groups_per_step - staleness`, bounds the
staleness of every token by construction.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from postroad_trainer.plug_points import plug_point

Verdict = Literal["accepted", "duplicate", "late"]


class FilterExhausted(RuntimeError):
    """The filter drops nearly everything: the run can't go on with this data, reward or filter."""


@dataclass(frozen=True)
class LedgerSettings:
    steps: int
    groups_per_step: int
    group_size: int
    staleness: int
    filter: str = "none"
    max_filtered: float = 20.0


@dataclass(frozen=True)
class Member:
    """What the ledger knows of a sample."""

    number: int
    member: int
    sequence: int
    sample: str
    reward: float
    oldest_version: int


@dataclass(frozen=True)
class Assignment:
    """Ask for this group. `complete`: all its members are in the log already, nothing needs to be generated."""

    number: int
    minimum_version: int
    complete: bool


@dataclass(frozen=True)
class Resolved:
    """A group that is counted and not trained."""

    number: int
    reason: str
    samples: list[str]


@dataclass(frozen=True)
class Batch:
    """The groups of one step in issue order, each with its members in member order."""

    groups: list[list[Member]]
    dropped: list[Resolved]

    @property
    def numbers(self) -> list[int]:
        return [members[0].number for members in self.groups]


@dataclass
class _Group:
    number: int
    members: dict[int, Member] = field(default_factory=dict)
    failed: str | None = None
    kept: bool = False


class Ledger:
    """`version`: the trainer's; `next_number`: all groups below it are resolved when the ledger is made."""

    def __init__(self, settings: LedgerSettings, *, version: int = 0, next_number: int = 0) -> None:
        self.settings = settings
        self.version = version
        self._next = next_number
        self._open: OrderedDict[int, _Group] = OrderedDict()
        self._early: dict[int, _Group] = {}
        self._dropped: list[Resolved] = []
        self._filtered = 0
        self._training: list[int] = []

    @property
    def outstanding(self) -> int:
        return len(self._open)

    @property
    def resolved_below(self) -> int:
        """All groups below this number are trained or dropped."""
        return next(iter(self._open), self._next)

    def next_assignment(self) -> Assignment | None:
        """The next group to ask for, or None while the credit is used up."""
        settings = self.settings
        remaining = max(settings.steps - self.version, 0) * settings.groups_per_step
        place = len(self._open)
        if place >= min((settings.staleness + 1) * settings.groups_per_step, remaining):
            return None
        number, self._next = self._next, self._next + 1
        group = self._open[number] = self._early.pop(number, None) or _Group(number)
        minimum = self.version + place // settings.groups_per_step - settings.staleness
        complete = len(group.members) == settings.group_size or group.failed is not None
        return Assignment(number, max(minimum, 0), complete)

    def add(self, member: Member) -> Verdict:
        """A sample of the log. `late`: its group is resolved already."""
        group = self._group(member.number)
        if group is None:
            return "late"
        if member.member in group.members:
            return "duplicate"
        group.members[member.member] = member
        return "accepted"

    def fail(self, number: int, reason: str) -> bool:
        """This group won't be complete: dropped when its turn comes. False where it is resolved already."""
        group = self._group(number)
        if group is None or group.kept:
            return False
        group.failed = group.failed or reason
        return True

    def incomplete(self) -> list[int]:
        """Open groups that wait for members."""
        return [
            group.number
            for group in self._open.values()
            if group.failed is None and len(group.members) < self.settings.group_size
        ]

    def take_batch(self) -> Batch | None:
        """The next batch, or None while a group of it is incomplete. Its groups stay open until `complete_step`."""
        if self._training:
            raise RuntimeError("a batch is in training already: complete_step first")
        batch: list[_Group] = []
        for group in list(self._open.values()):
            if len(batch) == self.settings.groups_per_step:
                break
            reason = self._drop_reason(group)
            if reason is not None:
                self._drop(group, reason)
            elif len(group.members) == self.settings.group_size:
                group.kept = True
                batch.append(group)
            else:
                return None
        if len(batch) < self.settings.groups_per_step:
            return None
        self._training = [group.number for group in batch]
        dropped, self._dropped, self._filtered = self._dropped, [], 0
        return Batch([[group.members[i] for i in sorted(group.members)] for group in batch], dropped)

    def complete_step(self, version: int) -> None:
        """The batch in training made `version`, which is published: its credit is free again."""
        for number in self._training:
            del self._open[number]
        self._training = []
        self.version = version

    def _group(self, number: int) -> _Group | None:
        if number in self._open:
            return self._open[number]
        if number < self._next:
            return None
        return self._early.setdefault(number, _Group(number))

    def _drop_reason(self, group: _Group) -> str | None:
        if group.failed is not None:
            return group.failed
        if len(group.members) < self.settings.group_size or group.kept:
            return None
        oldest = min(member.oldest_version for member in group.members.values())
        if self.version - oldest > self.settings.staleness:
            return "stale"
        return None if self._keeps([group.members[i] for i in sorted(group.members)]) else "filtered"

    def _keeps(self, members: list[Member]) -> bool:
        """Whether the filter lets a complete group be trained."""
        match self.settings.filter:
            case "none":
                return True
            case "zero_std":
                return len({member.reward for member in members}) > 1
            case path:
                return bool(plug_point("trainer.filter", path)(members))

    def _drop(self, group: _Group, reason: str) -> None:
        del self._open[group.number]
        self._dropped.append(Resolved(group.number, reason, [m.sample for m in group.members.values()]))
        if reason == "filtered":
            self._filtered += 1
            limit = self.settings.max_filtered * self.settings.groups_per_step
            if self._filtered > limit:
                raise FilterExhausted(
                    f"{self._filtered} groups of one step were dropped by trainer.filter {self.settings.filter}, limit "
                    f"{limit:.0f}: the task is too easy or too hard for this model, or the grader is broken"
                )
