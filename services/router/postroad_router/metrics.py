"""The router's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("postroad_router_requests", "Requests by route and status", ["route", "status"])
SECONDS = Histogram(
    "postroad_router_request_seconds", "Seconds to the end of the answer", ["route"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)  # fmt: skip
TOKENS = Counter("postroad_router_tokens", "Tokens that engines have delivered")
ENGINE_FAILURES = Counter("postroad_router_engine_failures", "Failed attempts by kind", ["kind"])
UNMATCHED = Counter("postroad_router_unmatched_tokens", "Generated tokens whose routed experts are not known")
SESSION_TURNS = Counter(
    "postroad_router_session_turns",
    "Turns of sessions by their prompt: begun, appended to an earlier turn, or rewritten by the template", ["how"],
)  # fmt: skip
DRIFT = Counter("postroad_router_session_drift", "Pieces of sessions that differ from the template's own", ["kind"])
IN_FLIGHT = Gauge("postroad_router_in_flight_requests", "Generations that are running")
ENGINES = Gauge("postroad_router_engines", "Engines by state", ["state"])
