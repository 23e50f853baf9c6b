"""Where every finished attempt went: the proof that nothing was lost and nothing was trained twice.

Each acknowledged trajectory is in exactly one of trained, dead, pending and lost. The core is pure; `read_audit` feeds
it from the logs alone, so that an audit can be made of a live run, a finished one and a crashed one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from postroad.bus import Bus, LoggedMessage
from postroad.messages import DeadLetter, Message, Sample, Step, Trajectory, VersionSpan
from postroad.messages.trajectory import trajectory_id

STREAMS_IN_ORDER = ("TRAJECTORIES", "SAMPLES", "DEAD", "STEPS")  # a step is read after the samples that it may hold


@dataclass
class Audit:
    """Filled by `add`; then `result`. Holds names and version spans, never tokens."""

    groups: dict[str, str] = field(default_factory=dict)  # of acknowledged attempts
    evaluation: set[str] = field(default_factory=set)
    spans: dict[str, list[VersionSpan]] = field(default_factory=dict)  # of graded attempts
    letters: dict[str, str] = field(default_factory=dict)  # attempt → reason
    group_letters: dict[str, str] = field(default_factory=dict)  # group → reason
    steps: list[Step] = field(default_factory=list)
    reasons_of_letters: Counter[str] = field(default_factory=Counter)

    def add(self, message: Message) -> None:
        if isinstance(message, Trajectory):
            name = trajectory_id(message.group, message.member)
            if message.task.purpose == "train":
                self.groups[name] = message.group
            else:
                self.evaluation.add(name)
        elif isinstance(message, Sample):
            name = trajectory_id(message.group, message.member)
            self.spans.setdefault(name, message.trajectory.versions)
            if message.trajectory.task.agent.get("kind") == "given":  # no worker made it: its sample acknowledges it
                self.groups[name] = message.group
        elif isinstance(message, DeadLetter):
            self.reasons_of_letters[message.reason] += 1
            if message.stage == "task" or message.member is None:
                self.group_letters.setdefault(message.group, message.reason)
            else:
                self.letters.setdefault(trajectory_id(message.group, message.member), message.reason)
        elif isinstance(message, Step):
            self.steps.append(message)

    def result(self, *, staleness: int, finished: bool) -> dict[str, Any]:
        """The counts. What is not resolved is pending while the run can go on, and lost once it has finished; what was
        left out of the step that trained its group is lost at any time."""
        times = Counter(sample for step in self.steps for sample in step.samples)
        trained_groups = {group for step in self.steps for group in step.groups}
        reasons_of = self._reasons()
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for sample, group in self.groups.items():
            if sample in times:
                counts["trained"] += 1
            elif sample in reasons_of:
                counts["dead"] += 1
                reasons[reasons_of[sample]] += 1
            else:
                counts["lost" if finished or group in trained_groups else "pending"] += 1
        return {
            "acknowledged": len(self.groups),
            **{name: counts[name] for name in ("trained", "dead", "pending", "lost")},
            "twice": sum(count > 1 for count in times.values()),
            "wrong_version": self._wrong_versions(staleness),
            "unacknowledged": sum(sample not in self.groups for sample in times),
            "reasons": dict(sorted(reasons.items())),
            "dead_letters": dict(sorted(self.reasons_of_letters.items())),
            "evaluation": {
                "acknowledged": len(self.evaluation),
                "graded": len(self.evaluation & self.spans.keys()),
                "dead": len(self.evaluation & self.letters.keys()),
            },
        }

    def _reasons(self) -> dict[str, str]:
        """Why an attempt was counted and not trained. A graded attempt that came after its group was given up has the
        group's reason; one that was never graded has none, and is not excused by its group."""
        dropped = {sample: group.reason for step in self.steps for group in step.dropped for sample in group.samples}
        given_up = self.group_letters | {group.group: group.reason for step in self.steps for group in step.dropped}
        late = {
            sample: given_up[group]
            for sample, group in self.groups.items()
            if group in given_up and sample in self.spans
        }
        return late | dropped | self.letters

    def _wrong_versions(self, staleness: int) -> int:
        """Trained samples with a token of a version that was never published, or of other content than the published
        one, or older than the bound allows; and those whose versions the log can't show."""
        digests = {step.version: step.digest for step in self.steps}

        def is_wrong(sample: str, number: int) -> bool:
            spans = self.spans.get(sample)
            return not spans or any(
                span.version not in digests
                or (span.digest and span.digest != digests[span.version])
                or not 0 <= number - 1 - span.version <= staleness
                for span in spans
            )

        return sum(is_wrong(sample, step.number) for step in self.steps for sample in step.samples)


async def read_audit(bus: Bus, *, staleness: int, finished: bool) -> dict[str, Any]:
    """The audit of the bus's run. Raises BusError."""
    audit = Audit()
    for stream in STREAMS_IN_ORDER:
        async for entry in bus.replay(stream):
            if isinstance(entry, LoggedMessage):
                audit.add(entry.message)
    return audit.result(staleness=staleness, finished=finished)


def audit_line(audit: dict[str, Any]) -> str:
    """`audit: acknowledged A trained T dead D pending P lost L twice W`."""
    names = ("acknowledged", "trained", "dead", "pending", "lost", "twice")
    return "audit: " + " ".join(f"{name} {audit[name]}" for name in names)
