"""How long a version takes to reach N engines: a simulation in rounds of one slice, from the measured rate of one link.

Trainer and engines have `ranks` links each, of `rate` bytes per second in and as much out, at the same time. Every rank
of an engine needs its slice once. Without the relay only the trainer's link sends it; with it, every engine that has it
sends it too. A source has at most READS readers at a time, which share its link; a reader has one source at a time.
"""

from __future__ import annotations

import heapq

from postroad.weights.puller import READS_PER_SOURCE


def spread_time_s(size_bytes: int, ranks: int, engines: int, rate: float, *, relay: bool) -> float:
    """Seconds until the last of `engines` has it; slices are independent of each other, so one is simulated."""
    slice_s = size_bytes / ranks / rate  # alone on a link
    waiting, finished = engines, 0.0
    events: list[tuple[float, int]] = [(0.0, 1)]  # at a time, so many sources become free (or are new)
    while waiting:
        now, sources = heapq.heappop(events)
        while events and events[0][0] == now:
            sources += heapq.heappop(events)[1]
        served = min(waiting, sources * READS_PER_SOURCE)
        waiting -= served
        readers, sources_used = served, min(sources, served)
        per_source = -(-readers // sources_used)
        finished = now + per_source * slice_s
        heapq.heappush(events, (finished, sources + (readers if relay else 0)))
    return finished
