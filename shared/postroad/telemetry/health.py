"""/livez, /readyz and /metrics for services that serve nothing else over HTTP: one daemon thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer

from prometheus_client import MetricsHandler


class HealthServer:
    """Answers on `host:port` (0: a free port, see `port`). `ready` says whether the service can take work."""

    def __init__(self, host: str, port: int, ready: Callable[[], bool]) -> None:
        class Handler(MetricsHandler):
            def do_GET(self) -> None:
                if self.path in ("/livez", "/readyz"):
                    good = self.path == "/livez" or ready()
                    self.send_response(200 if good else 503)
                    self.end_headers()
                    self.wfile.write(b"ok\n" if good else b"not ready\n")
                else:
                    super().do_GET()

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
