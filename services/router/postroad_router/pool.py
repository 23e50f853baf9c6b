"""The engines that are known and how well they are: pure state, given the time and the registry's content from outside.

An engine that fails is quarantined, each time for longer; after that it is probed, and works again once the probe
succeeds and it serves the current weights. A new process or address under its name starts with a clean slate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SERVING = "ready"  # a new engine is not, until it has pulled the newest weights for the first time
QUARANTINE_S = 0.5
QUARANTINE_MAX_S = 30.0


@dataclass(eq=False)
class Engine:
    """One engine as it last registered, and what this router has given it: `tokens` are those of its `requests`, of
    the prompts and the most that may be generated."""

    name: str
    url: str
    pid: int = 0
    version: int = 0
    digest: str = ""
    state: str = "ready"
    role: str = "mixed"
    bootstrap_port: int = 0
    slots: int = 1
    running: int = 0
    json_schema: bool = False  # decodes within a JSON schema
    requests: int = 0
    tokens: int = 0
    failures: int = 0
    quarantined_until: float | None = None

    @property
    def well(self) -> bool:
        return self.quarantined_until is None and self.state == SERVING

    @property
    def load(self) -> tuple[float, int, str]:
        return (self.tokens / max(self.slots, 1), self.running, self.name)


class Pool:
    """The known engines by name."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}

    def update(self, members: Mapping[str, Mapping[str, Any]]) -> bool:
        """Take over the registry's content; True where something that matters to routing changed."""
        before = self._matters()
        for name in self.engines.keys() - members.keys():
            del self.engines[name]
        for name, info in members.items():
            url, pid = info["url"].rstrip("/"), info.get("pid", 0)
            engine = self.engines.get(name)
            if engine is None or (engine.url, engine.pid) != (url, pid):
                engine = self.engines[name] = Engine(name, url, pid)
            engine.version, engine.digest = info.get("version", 0), str(info.get("digest", ""))
            engine.state, engine.role = str(info.get("state", SERVING)), str(info.get("role", "mixed"))
            engine.bootstrap_port = info.get("bootstrap_port") or 0
            engine.slots, engine.running = info.get("slots", 1), info.get("running", 0)
            engine.json_schema = info.get("json_schema") is True
        return before != self._matters()

    def _matters(self) -> dict[str, tuple[Any, ...]]:
        return {name: (e.url, e.pid, e.version, e.state, e.role) for name, e in self.engines.items()}

    def start(self, engine: Engine, tokens: int) -> None:
        engine.requests += 1
        engine.tokens += tokens

    def end(self, engine: Engine, tokens: int) -> None:
        engine.requests -= 1
        engine.tokens -= tokens

    def succeed(self, engine: Engine) -> None:
        engine.failures = 0

    def fail(self, engine: Engine, now: float) -> None:
        """Quarantine. Failures of requests that ran at the same time count once."""
        if engine.quarantined_until is None:
            engine.failures += 1
            engine.quarantined_until = now + quarantine_s(engine.failures)

    def due_probes(self, now: float) -> list[Engine]:
        """Engines whose quarantine has run out and that serve what the healthy ones do."""
        current = max((engine.version for engine in self.engines.values() if engine.well), default=0)
        return [
            engine
            for engine in self.engines.values()
            if engine.quarantined_until is not None and engine.quarantined_until <= now and engine.version >= current
        ]

    def probed(self, engine: Engine, healthy: bool, now: float) -> None:
        if healthy:
            engine.quarantined_until = None
        else:
            engine.failures += 1
            engine.quarantined_until = now + quarantine_s(engine.failures)


def quarantine_s(failures: int) -> float:
    return float(min(QUARANTINE_S * 2 ** min(failures - 1, 16), QUARANTINE_MAX_S))
