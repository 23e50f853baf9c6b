"""When a process that died is started again, and when it is given up. Pure: times are given in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
GOOD_LIFE_S = 30.0
FAILURES = 10
WINDOW_S = 60.0
FAILURES_EVER = 30


@dataclass
class Restarts:
    """Delays double from FIRST_DELAY_S to LONGEST_DELAY_S and start over after a life of GOOD_LIFE_S. A process that
    fails FAILURES times in a row within WINDOW_S is given up, and so is one that fails FAILURES_EVER times in a row,
    however slowly."""

    count: int = 0
    _failures: deque[float] = field(default_factory=lambda: deque(maxlen=FAILURES_EVER))

    def after(self, alive_s: float, now: float) -> float | None:
        """Seconds to wait before the next start of a process that lived `alive_s`; None: give up."""
        if alive_s >= GOOD_LIFE_S:
            self._failures.clear()
        self._failures.append(now)
        if len(self._failures) >= FAILURES and now - self._failures[-FAILURES] <= WINDOW_S:
            return None
        if len(self._failures) >= FAILURES_EVER:
            return None
        self.count += 1
        return min(FIRST_DELAY_S * 2.0 ** (len(self._failures) - 1), LONGEST_DELAY_S)
