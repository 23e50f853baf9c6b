"""The worker's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

MEMBERS = Counter("postroad_worker_members", "Members of groups by outcome", ["outcome"])
RETRIES = Counter("postroad_worker_model_retries", "Calls of the model that were made again, by reason", ["reason"])
TOKENS = Counter("postroad_worker_tokens", "Generated tokens of published trajectories")
SECONDS = Histogram(
    "postroad_worker_member_seconds", "Seconds from the start of a member to its trajectory",
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
)  # fmt: skip
GROUPS = Gauge("postroad_worker_groups", "Groups in hand")
TOOL_CALLS = Counter("postroad_worker_tool_calls", "Calls of tools by status", ["status"])
