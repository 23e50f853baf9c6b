"""One generation, put together from the streams of however many engines it took. Pure: no I/O, no clock.

An engine's chunks are SGLang's: cumulative or incremental `output_ids`, told apart by `completion_tokens`.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from postroad_router.errors import EngineFailure
from postroad_router.generation import Finish, GenerationRequest, TokenChunk
from postroad_router.model import ModelFacts

Decode = Callable[[list[int]], str]


class Splice:
    """`tokens` and its companions are what has been generated so far. `begin` starts an engine's part, `accept` takes
    its chunks, `break_off` keeps what a failed engine has delivered. `complete` says that nothing is missing."""

    def __init__(self, request: GenerationRequest, model: ModelFacts, decode: Decode) -> None:
        self.request, self.model, self._decode = request, model, decode
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._experts: np.ndarray | None = None
        self._base = 0
        self._raw_experts: tuple[str, int] | None = None

    @property
    def complete(self) -> bool:
        return self.finish is not None and (not self.request.routed_experts or self._missing_rows == 0)

    @property
    def routed_experts(self) -> np.ndarray | None:
        return self._experts[: self._rows] if self._experts is not None else None

    @property
    def _rows(self) -> int:
        return max(len(self.request.prompt) + len(self.tokens) - 1, 0)

    @property
    def _missing_rows(self) -> int:
        return max(self._rows - (0 if self._experts is None else len(self._experts)), 0)

    def begin(self) -> dict[str, Any]:
        """The engine's request for what is left; for no token at all where only routed experts are missing."""
        self._base, self._raw_experts = len(self.tokens), None
        request = self.request
        left = 0 if self.finish is not None else request.max_new_tokens - len(self.tokens)
        sampling: dict[str, Any] = {
            "temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k, "min_p": request.min_p,
            "max_new_tokens": left, "min_new_tokens": min(max(request.min_new_tokens - len(self.tokens), 0), left),
            "stop": list(request.stop), "stop_token_ids": list(request.stop_token_ids),
            "ignore_eos": request.ignore_eos,
            "stream_interval": request.stream_interval, "no_stop_trim": True, "skip_special_tokens": False,
        }  # fmt: skip
        if request.seed is not None:
            sampling["sampling_seed"] = request.seed % 2**63
        if request.json_schema:
            sampling["json_schema"] = request.json_schema
        body: dict[str, Any] = {
            "input_ids": [*request.prompt, *self.tokens], "sampling_params": sampling, "stream": True,
            "return_logprob": True,
        }  # fmt: skip
        if request.top_logprobs:
            body["top_logprobs_num"] = request.top_logprobs
        if request.routed_experts:
            body["return_routed_experts"] = True
        return body

    def accept(self, chunk: dict[str, Any], engine: str) -> TokenChunk:
        """Take an engine's chunk. Raises EngineFailure where it makes no sense, is too old, or says `abort`."""
        try:
            meta = chunk["meta_info"]
            received = len(self.tokens) - self._base
            count = meta["completion_tokens"] - received
            tokens = _last(chunk["output_ids"], count)
            log_probabilities = [self._checked(entry, token) for entry, token in _pairs(meta, tokens, count)]
            versions = self._versions(meta, received, count)
            top = self._top(meta, count)
            digests = {int(v): str(digest) for v, digest in (meta.get("weight_digests") or {}).items()}
            finish = self._engine_finish(meta)
            if isinstance(meta.get("routed_experts"), str):
                self._raw_experts = (meta["routed_experts"], self._base + meta["completion_tokens"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EngineFailure("garbage", f"{engine} sent a chunk that can't be read: {error!r}") from error
        if self.finish is not None:  # asked for routed experts alone
            tokens, log_probabilities, versions, top = [], [], [], []
        self.tokens += tokens
        stopped = self._stop_within(len(tokens))
        if stopped is not None:
            surplus = len(self.tokens) - stopped
            del self.tokens[stopped:]
            keep = len(tokens) - surplus
            tokens, log_probabilities, versions, top = (
                tokens[:keep],
                log_probabilities[:keep],
                versions[:keep],
                top[:keep],
            )
            finish = "stop"
        if finish is not None:
            self.finish = self.finish or finish
            self._merge_experts()
        return TokenChunk(tokens, log_probabilities, versions, engine, top, digests)

    def break_off(self) -> None:
        """The engine failed: keep its tokens, and see whether the last of them ended the generation."""
        self._merge_experts()
        if self.finish is None and self.tokens:
            ends = not self.request.ignore_eos and self.tokens[-1] in self.model.end_ids
            if (ends and len(self.tokens) > self.request.min_new_tokens) or (
                self.tokens[-1] in self.request.stop_token_ids or self._contains_stop(self.tokens)
            ):
                self.finish = "stop"
            elif len(self.tokens) >= self.request.max_new_tokens:
                self.finish = "length"

    # ── an engine's chunk ────────────────────────────────────────────────────────────────────────────────────────
    def _checked(self, entry: list[Any], token: int) -> float:
        if type(token) is not int or not 0 <= token < self.model.vocabulary or entry[1] != token:
            raise ValueError(f"token {token!r} with log-probability entry {entry!r}")
        value = float(entry[0])
        if not math.isfinite(value) or value > 1e-3:
            raise ValueError(f"log-probability {value} of token {token}")
        return value

    def _versions(self, meta: dict[str, Any], received: int, count: int) -> list[int]:
        if "weight_versions" not in meta:
            versions = [int(meta["weight_version"])] * count
        else:
            known: dict[int, int] = {}
            for start, end, version in meta["weight_versions"]:
                known.update(dict.fromkeys(range(max(start, received), min(end, received + count)), int(version)))
            versions = [known[position] for position in range(received, received + count)]
        oldest = min(versions, default=self.request.minimum_version)
        if oldest < self.request.minimum_version:
            raise EngineFailure("stale", f"a token of version {oldest}, asked was {self.request.minimum_version}")
        return versions

    def _top(self, meta: dict[str, Any], count: int) -> list[list[tuple[float, int]]]:
        if not self.request.top_logprobs:
            return []
        return [[(float(e[0]), int(e[1])) for e in entries] for entries in _last(meta["output_top_logprobs"], count)]

    def _engine_finish(self, meta: dict[str, Any]) -> Finish | None:
        reason = meta.get("finish_reason")
        if reason is None:
            return None
        kind = reason if isinstance(reason, str) else reason["type"]
        if kind == "abort":
            raise EngineFailure("aborted", f"the engine aborted: {reason}")
        if kind not in ("stop", "length"):
            raise ValueError(f"finish reason {kind!r}")
        return "stop" if kind == "stop" else "length"

    # ── stop strings across a seam ───────────────────────────────────────────────────────────────────────────────
    def _contains_stop(self, tokens: list[int]) -> bool:
        text = self._decode(tokens) if self.request.stop else ""
        return any(stop in text for stop in self.request.stop)

    def _stop_within(self, new: int) -> int | None:
        """The number of tokens after which a stop string is complete that began before this engine's part: the engine
        can't see it. None where there is none."""
        if not self._base or self.finish is not None or not self._contains_stop(self.tokens):
            return None
        candidates = range(len(self.tokens) - new, len(self.tokens) + 1)
        return next(length for length in candidates if self._contains_stop(self.tokens[:length]))

    # ── routed experts ───────────────────────────────────────────────────────────────────────────────────────────
    def _merge_experts(self) -> None:
        """Add the rows that are not known yet: a row stays that of the engine which generated with it. Rows that make
        no sense stay missing, and are asked for again."""
        if not self.request.routed_experts or self._raw_experts is None:
            return
        text, generated = self._raw_experts
        self._raw_experts = None
        rows = max(len(self.request.prompt) + generated - 1, 0)
        try:
            flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
            experts = flat.reshape(-1, len(self.model.moe_layers) or 1, self.model.experts_per_token)[:rows]
        except (binascii.Error, ValueError):
            return
        if len(experts) < rows or (experts.size and not 0 <= experts.min() <= experts.max() < self.model.experts):
            return
        narrow = experts.astype(np.uint8 if self.model.experts <= 256 else np.uint16)
        known = self._experts
        self._experts = narrow if known is None else np.concatenate([known, narrow[len(known) :]])


def _last(values: list[Any], count: int) -> list[Any]:
    if not 0 <= count <= len(values):
        raise ValueError(f"{len(values)} entries for {count} new tokens")
    return list(values[len(values) - count :])


def _pairs(meta: dict[str, Any], tokens: list[int], count: int) -> list[tuple[list[Any], int]]:
    return list(zip(_last(meta["output_token_logprobs"], count), tokens, strict=True))
