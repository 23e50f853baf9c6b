"""Liveness, readiness and metrics of a service without HTTP of its own."""

from __future__ import annotations

import httpx

from postroad.telemetry.health import HealthServer


def test_ready_follows_the_service_and_metrics_are_served():
    ready = False
    server = HealthServer("127.0.0.1", 0, lambda: ready)
    try:
        url = f"http://127.0.0.1:{server.port}"
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.get(f"{url}/readyz").status_code == 503
        ready = True
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert "python_info" in httpx.get(f"{url}/metrics").text
    finally:
        server.close()
