"""`python -m postroad_reward.tools.retriever CORPUS PORT`: BM25 over a corpus by Search-R1's HTTP contract (see search.py).

One corpus in memory for many reward processes, or for other programs that speak the contract. It has no authentication:
it listens on HOST, 127.0.0.1 unless a third argument says otherwise.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from postroad_reward.tools.base import ToolSettingsError
from postroad_reward.tools.search import Corpus

LIMIT_BYTES = 1 << 20
IDLE_S = 60.0


def server(corpus: Corpus, host: str, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = IDLE_S

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/retrieve" or size > LIMIT_BYTES:
                self._send(404, {"error": f"POST /retrieve with at most {LIMIT_BYTES} bytes"})
                return
            try:
                self._send(200, {"result": retrieve(corpus, json.loads(self.rfile.read(size)))})
            except (ValueError, TypeError, LookupError) as error:
                self._send(400, {"error": f"{type(error).__name__}: {error}"})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not every request."""

    return ThreadingHTTPServer((host, port), Handler)


def retrieve(corpus: Corpus, asked: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """For each query its documents, with scores where they are asked for."""
    found = [corpus.search(str(query), int(asked.get("topk") or 3)) for query in asked["queries"]]
    if asked.get("return_scores"):
        return [[{"document": vars(document), "score": score} for document, score in hits] for hits in found]
    return [[vars(document) for document, _ in hits] for hits in found]


if __name__ == "__main__":
    try:
        host = sys.argv[3] if len(sys.argv) > 3 else "127.0.0.1"
        server(Corpus(Path(sys.argv[1])), host, int(sys.argv[2])).serve_forever()
    except ToolSettingsError as error:
        sys.exit(str(error))
