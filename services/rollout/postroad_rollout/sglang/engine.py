"""SGLang behind the verbs of the weight puller: stage while it serves, then switch in one request.

What becomes of running requests (design §5):
  finish    SGLang takes the weights when the requests that run have ended; new ones wait.
  continue  they are aborted with what they have, and the router goes on from there under the new version, so that each
            token's version is known (SGLang's own `retract` would name all of a response's tokens after the last one).
  keep_kv   paused in place, and gone on with their keys and values of the old version.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import httpx
import torch

from postroad_rollout.engine.errors import ActivationError
from postroad_rollout.sglang.weights import StagedWeights

REQUEST_S = 60.0


class Serializer(Protocol):
    def __call__(self, staged: StagedWeights) -> str: ...


class SGLangEngine:
    """`version` and `digest` name what the server serves; 0 and "" until the first activation."""

    def __init__(self, url: str, key: str, serialize: Serializer, *, ranks: int = 1, device: str = "cuda") -> None:
        self.version, self.digest = 0, ""
        self._serialize, self._ranks, self._device = serialize, ranks, device
        self._staged: StagedWeights | None = None
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=REQUEST_S)

    def close(self) -> None:
        self._client.close()

    def stage(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy a full set of weights to the GPU, beside those that are served; one buffer, kept for the next version."""
        previous, self._staged = self._staged, None
        self._staged = StagedWeights.copy_of(named_tensors, self._device, previous)

    def activate(self, version: int, digest: str, mode: str) -> float:
        """Serve the staged weights; the pause in milliseconds. Raises ActivationError where the server refused them:
        what it serves then has no name, and it must be started anew."""
        if self._staged is None:
            raise ActivationError("no weights are staged: stage a full set first")
        body: dict[str, Any] = {
            "serialized_named_tensors": [self._serialize(self._staged)] * self._ranks,
            "load_format": "flattened_bucket", "weight_version": str(version),
            "flush_cache": mode != "keep_kv", "abort_all_requests": mode == "continue",
        }  # fmt: skip
        started = time.perf_counter()
        if mode == "keep_kv":
            self._post("/pause_generation", {"mode": "in_place"})
        try:
            self._post("/update_weights_from_tensor", body)
        finally:
            if mode == "keep_kv":
                self._post("/continue_generation", {})
        pause_ms = (time.perf_counter() - started) * 1000
        served = self._client.get("/model_info").raise_for_status().json()["weight_version"]
        if served != str(version):
            raise ActivationError(f"SGLang says that it serves version {served!r} after it was given {version}")
        self.version, self.digest = version, digest
        return pause_ms

    def _post(self, path: str, body: dict[str, Any]) -> None:
        response = self._client.post(path, json=body)
        answer = response.json() if response.headers.get("content-type", "").startswith("application/json") else {}
        if response.status_code != httpx.codes.OK or (isinstance(answer, dict) and answer.get("success") is False):
            raise ActivationError(f"SGLang answered {path} with {response.status_code}: {response.text[:500]}")
