"""Prometheus metrics, read from the engine's own counters at scrape time."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .loop import Engine

PREFIX = "postroad_rollout_engine"


class EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        status, counters = self.engine.status, self.engine.counters
        gauges = {
            "requests_running": ("Requests that hold a slot", status.running),
            "requests_waiting": ("Requests without a slot", status.waiting),
            "cache_tokens": ("Tokens of running requests", status.tokens),
            "weight_version": ("Version of the served weights", status.version),
            "activation_pause_ms": ("Length of the last switch of weights", status.pause_ms),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        for name in ("steps", "prompt_tokens", "cached_tokens", "prefill_tokens", "generated_tokens"):
            yield CounterMetricFamily(f"{PREFIX}_{name}", name.replace("_", " "), getattr(counters, name))
        ended = CounterMetricFamily(f"{PREFIX}_requests_finished", "Requests that ended, by reason", labels=["reason"])
        for reason, count in counters.finished.items():
            ended.add_metric([reason], count)
        yield ended


def exposition(engine: Engine) -> bytes:
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return generate_latest(registry)
