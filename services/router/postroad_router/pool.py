"""Which engine gets a request: pure state, given the time and the registry's content from outside.

An engine that fails is quarantined, each time for longer; after that it is probed, and works again once the probe
succeeds. A new process or address under its name starts with a clean slate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SERVING = "ready"  # a new engine is not, until it has pulled the newest weights for the first time
QUARANTINE_S = 0.5
QUARANTINE_MAX_S = 30.0


@dataclass
class Engine:
    """One engine as it last registered, and what this router has given it."""

    name: str
    url: str
    pid: int = 0
    version: int = 0
    digest: str = ""
    state: str = "ready"
    slots: int = 1
    running: int = 0
    json_schema: bool = False  # decodes within a JSON schema
    requests: int = 0
    tokens: int = 0
    failures: int = 0
    quarantined_until: float | None = None

    @property
    def load(self) -> tuple[float, int, int, str]:
        return (self.requests / max(self.slots, 1), self.tokens, self.running, self.name)


class Pool:
    """The known engines by name."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}

    def update(self, members: Mapping[str, Mapping[str, Any]]) -> bool:
        """Take over the registry's content; True where something that matters to routing changed."""
        before = {name: (e.url, e.pid, e.version, e.state) for name, e in self.engines.items()}
        for name in self.engines.keys() - members.keys():
            del self.engines[name]
        for name, info in members.items():
            url, pid = info["url"].rstrip("/"), info.get("pid", 0)
            engine = self.engines.get(name)
            if engine is None or (engine.url, engine.pid) != (url, pid):
                engine = self.engines[name] = Engine(name, url, pid)
            engine.version, engine.digest = info.get("version", 0), str(info.get("digest", ""))
            engine.state = str(info.get("state", "ready"))
            engine.slots, engine.running = info.get("slots", 1), info.get("running", 0)
            engine.json_schema = info.get("json_schema") is True
        return before != {name: (e.url, e.pid, e.version, e.state) for name, e in self.engines.items()}

    def choose(self, minimum_version: int, avoid: frozenset[str] = frozenset()) -> Engine | None:
        """The least loaded engine that may serve this version, outside `avoid` where there is another."""
        able = [
            engine
            for engine in self.engines.values()
            if engine.quarantined_until is None and engine.state == SERVING and engine.version >= minimum_version
        ]
        return min(able, key=lambda engine: (engine.name in avoid, engine.load), default=None)

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
        """Engines whose quarantine has run out: each goes back to work if it answers a probe."""
        return [e for e in self.engines.values() if e.quarantined_until is not None and e.quarantined_until <= now]

    def probed(self, engine: Engine, healthy: bool, now: float) -> None:
        if healthy:
            engine.quarantined_until = None
        else:
            engine.failures += 1
            engine.quarantined_until = now + quarantine_s(engine.failures)


def quarantine_s(failures: int) -> float:
    return float(min(QUARANTINE_S * 2 ** min(failures - 1, 16), QUARANTINE_MAX_S))
