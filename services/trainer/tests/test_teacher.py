"""The teacher over HTTP: retries, refusals and what of an answer is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from training_parts import groups_of

from postroad_trainer import teacher as module
from postroad_trainer.teacher import Teacher, TeacherError


class Engine(BaseHTTPRequestHandler):
    """Gives token t the log-probability -t / 100; `faults` are statuses that come first."""

    faults: list[int]
    seen: list[tuple[dict[str, Any], str | None]]
    shift = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((body, self.headers["Authorization"]))
        status = self.faults.pop() if self.faults else 200
        scores = [[-t / 100, t + self.shift, None] for t in body["input_ids"]]
        scores[0][0] = None
        answer = json.dumps({"meta_info": {"input_token_logprobs": scores}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Engine], str]]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    handler = type("Handler", (Engine,), {"faults": [], "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


async def test_every_trained_token_is_scored_once_at_the_sampling_temperature(engine: tuple[type[Engine], str]) -> None:
    handler, url = engine
    handler.faults = [503, 429]
    groups = groups_of([[1.0, 0.0]])
    scored = await Teacher(url, 0.7, "secret").scored(groups)
    for sample in scored[0]:
        expected = np.where(sample.trajectory.loss_mask, -sample.trajectory.tokens / 100, 0)
        np.testing.assert_allclose(sample.teacher_log_probabilities, expected, rtol=1e-6)
    assert len(handler.seen) == 4 and {key for _, key in handler.seen} == {"Bearer secret"}
    assert handler.seen[0][0]["sampling_params"] == {"max_new_tokens": 0, "temperature": 0.7}
    assert await Teacher(url, 0.7).scored(scored) == scored and len(handler.seen) == 4


async def test_another_vocabulary_and_a_teacher_that_refuses_are_named(engine: tuple[type[Engine], str]) -> None:
    handler, url = engine
    handler.shift = 1
    with pytest.raises(TeacherError, match="share their vocabulary"):
        await Teacher(url, 1.0).scored(groups_of([[1.0]]))
    handler.faults = [401]
    with pytest.raises(TeacherError, match="status 401"):
        await Teacher(url, 1.0).scored(groups_of([[1.0]]))
    handler.faults = [500] * 9
    with pytest.raises(TeacherError, match="status 500"):
        await Teacher(url, 1.0).scored(groups_of([[1.0]]))
