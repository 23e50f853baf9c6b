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
        self.unmatched: set[int] = set()  # tokens whose experts are not those of the pass that sampled them
        self._experts: list[np.ndarray] = []
        self._known = request.experts_known  # rows, from the prompt's first token on
        self._base = 0

    @property
    def complete(self) -> bool:
        return self.finish is not None and (not self.request.routed_experts or self._known >= self._rows)

    @property
    def routed_experts(self) -> np.ndarray | None:
        """The rows after the `experts_known` of the request, [tokens, MoE layers, top-k]."""
        if not self.request.routed_experts:
            return None
        kind = np.uint8 if self.model.experts <= 256 else np.uint16
        shape = (0, len(self.model.moe_layers), self.model.experts_per_token)
        rows = np.concatenate([np.empty(shape, kind), *self._experts])
        return rows[: max(self._rows - self.request.experts_known, 0)]

    @property
    def _rows(self) -> int:
        return max(len(self.request.prompt) + len(self.tokens) - 1, 0)

    def begin(self) -> dict[str, Any]:
        """The engine's request for what is left; for no token at all where only routed experts are missing."""
        self._base = len(self.tokens)
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
            if self._known:
                body["routed_experts_start_len"] = self._known
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
            experts = meta.get("routed_experts")
            if experts is not None and self.request.routed_experts:
                self._take_experts(experts, self._base + meta["completion_tokens"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EngineFailure("garbage", f"{engine} sent a chunk that can't be read: {error!r}") from error
        if self.finish is not None:  # asked for routed experts alone
            tokens, log_probabilities, versions, top = [], [], [], []
        self.tokens += tokens
        stopped = self._stop_within(len(tokens))
        if stopped is not None:
            keep = len(tokens) - len(self.tokens) + stopped
            del self.tokens[stopped:]
            tokens, log_probabilities = tokens[:keep], log_probabilities[:keep]
            versions, top = versions[:keep], top[:keep]
            finish = "stop"
        self.finish = self.finish or finish
        return TokenChunk(tokens, log_probabilities, versions, engine, top, digests)

    def break_off(self) -> None:
        """The engine failed: keep its tokens, and see whether the last of them ended the generation."""
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
        spans = meta.get("weight_versions")
        if spans is None:
            versions = [int(meta["weight_version"])] * count
        elif spans and spans[-1][0] <= received and spans[-1][1] == received + count:
            versions = [int(spans[-1][2])] * count
        else:
            known: dict[int, int] = {}
            for start, end, version in spans:
                known.update(dict.fromkeys(range(max(start, received), min(end, received + count)), int(version)))
            versions = [known[position] for position in range(received, received + count)]
        for version in set(versions):
            if not self.request.allows(version):
                raise EngineFailure("stale", f"a token of version {version}, asked was {self.request.versions_asked}")
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
    def _take_experts(self, given: Any, generated: int) -> None:
        """Add the rows that are not known yet: a row stays that of the engine which generated with it. Rows that make
        no sense stay missing, and are asked for again; those of tokens that are there already, from another engine or
        another pass, are `unmatched`."""
        width = max(len(self.model.moe_layers) * self.model.experts_per_token, 1)
        rows = max(len(self.request.prompt) + generated - 1, 0)
        try:
            if isinstance(given, str):
                flat = np.frombuffer(base64.b64decode(given, validate=True), dtype="<i4")
            else:
                flat = np.frombuffer(given["data"], np.dtype(given["dtype"]))
                rows = self._known + len(flat) // width
        except (binascii.Error, ValueError):
            return
        experts = self._shaped(flat, rows)
        if (
            experts is None
            or rows > len(self.request.prompt) + generated - 1
            or (experts.size and not 0 <= experts.min() <= experts.max() < self.model.experts)
        ):
            return
        first = max(self._known - len(self.request.prompt) + 1, 0)
        self.unmatched.update(range(first, min(self._base, rows - len(self.request.prompt) + 1)))
        self._experts.append(experts.astype(np.uint8 if self.model.experts <= 256 else np.uint16))
        self._known = rows

    def _shaped(self, flat: np.ndarray, rows: int) -> np.ndarray | None:
        """The rows from `_known` on: of the MoE layers or of all layers, and one more where the last token was
        computed too."""
        moe, wanted, per_token = list(self.model.moe_layers), rows - self._known, self.model.experts_per_token
        for more in (0, 1):
            if flat.size == (wanted + more) * len(moe) * per_token:
                return flat.reshape(-1, len(moe), per_token)[:wanted]
            if flat.size == (wanted + more) * self.model.layers * per_token:
                return flat.reshape(-1, self.model.layers, per_token)[:wanted, moe]
        return None


def _last(values: list[Any], count: int) -> list[Any]:
    if not 0 <= count <= len(values):
        raise ValueError(f"{len(values)} entries for {count} new tokens")
    return list(values[len(values) - count :])


def _pairs(meta: dict[str, Any], tokens: list[int], count: int) -> list[tuple[list[Any], int]]:
    return list(zip(_last(meta["output_token_logprobs"], count), tokens, strict=True))
