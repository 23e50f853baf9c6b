"""Continuous batching: which tokens of which request are computed in the next step, and what becomes of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .cache import SlotCache
from .handover import Handover
from .model import Model, Segment
from .request import Finish, Request
from .sampling import Row, sample, scaled_logits
from .weights import Weights

SHARE_TOKENS = 8  # a request waits for another's prefill if it saves at least so many tokens


@dataclass
class Served:
    """The weights in use and their names."""

    weights: Weights
    version: int
    digest: str


@dataclass
class Counters:
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})


class Scheduler:
    """Not thread-safe: owned by the model loop."""

    def __init__(self, model: Model, cache: SlotCache, tokenizer: Tokenizer | None, prefill_tokens: int) -> None:
        self.model, self.cache, self.tokenizer, self.prefill_tokens = model, cache, tokenizer, prefill_tokens
        self.max_length = cache.tokens.shape[1]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.admitting = True
        self.counters = Counters()

    def step(self, served: Served) -> bool:
        """Admit, compute one batch and sample; False when there was nothing to do."""
        if self.admitting:
            self._admit(served)
        chunks = self._chunks()
        if not chunks:
            return False
        hidden = self.model.forward(served.weights, self.cache, [segment for _, segment in chunks])
        done: list[Request] = []
        rows: list[int] = []
        row = 0
        for request, segment in chunks:
            self.cache.computed[request.slot] += segment.count
            self._score_prompt(served.weights, request, segment, hidden[row : row + segment.count])
            row += segment.count
            if segment.start + segment.count == request.length:
                done.append(request)
                rows.append(row - 1)
        if done:
            self._sample(served, done, hidden[rows])
        self.running = [r for r in self.running if r.finish is None]
        self.counters.steps += 1
        return True

    def _admit(self, served: Served) -> None:
        """Give free slots to waiting requests in order; one whose prefix is being computed right now waits for it."""
        filling = [r.slot for r in self.running if self.cache.length[r.slot] - self.cache.computed[r.slot] > 1]
        held: list[Request] = []
        while self.waiting and not self.cache.busy.all():
            request = self.waiting.popleft()
            tokens = np.array(request.prompt + request.output, np.int32)
            if request.handover is not None:
                self._take_over(request, request.handover, tokens, served)
                continue
            common = self.cache.common_prefix(tokens, request.reuse_limit)
            ready = int(np.minimum(common, self.cache.computed).max())
            if filling and int(common[filling].max()) - ready >= SHARE_TOKENS:
                held.append(request)
                continue
            acquired = self.cache.acquire(tokens, common)
            if acquired is None:
                raise RuntimeError("The slot cache has a free slot and did not give it.")
            request.slot, reused = acquired
            if request.cached_tokens is None:
                request.cached_tokens = reused
                self.counters.prompt_tokens += len(request.prompt)
                self.counters.cached_tokens += reused
            self.running.append(request)
            if request.length - reused > 1:
                filling.append(request.slot)
        self.waiting.extendleft(reversed(held))

    def _take_over(self, request: Request, handover: Handover, tokens: NDArray[np.int32], served: Served) -> None:
        """Go on from the keys and values that another engine computed, if it did so with the weights served here."""
        request.handover = None  # what comes after a retraction is computed here
        if (handover.version, handover.digest) != (served.version, served.digest):
            message = f"the prompt was computed by version {handover.version}, here {served.version} is served"
            self._finish(request, {"type": "abort", "message": message})
            return
        acquired = self.cache.acquire(tokens, np.zeros(len(self.cache.length), np.int64))
        if acquired is None:
            raise RuntimeError("The slot cache has a free slot and did not give it.")
        request.slot = acquired[0]
        self.cache.install(request.slot, handover.keys_values, handover.experts)
        request.cached_tokens = len(request.prompt) - 1
        self.running.append(request)

    def _chunks(self) -> list[tuple[Request, Segment]]:
        """All decode rows, sorted for attention (see model.plan), then prompt chunks up to `prefill_tokens`."""
        decode: list[tuple[Request, Segment]] = []
        prefill: list[tuple[Request, Segment]] = []
        budget = self.prefill_tokens
        for request in self.running:
            start = int(self.cache.computed[request.slot])
            pending = request.length - start
            if pending == 1:
                decode.append((request, Segment(request.slot, start, 1)))
            elif budget:
                count = min(pending, budget)
                budget -= count
                prefill.append((request, Segment(request.slot, start, count)))
                self.counters.prefill_tokens += count
        return sorted(decode, key=lambda d: (d[1].start, d[1].slot)) + prefill

    @torch.inference_mode()
    def _score_prompt(self, weights: Weights, request: Request, segment: Segment, hidden_TD: Tensor) -> None:
        """Log-probabilities of the wanted prompt tokens that this chunk predicts."""
        wanted = request.wanted_input
        first, last = max(wanted.start, segment.start + 1), min(len(request.prompt), segment.start + segment.count + 1)
        if not wanted or first >= last:
            return
        logits = self.model.logits(weights, hidden_TD[first - 1 - segment.start : last - 1 - segment.start])
        logprobs = scaled_logits(logits, [request.params.temperature] * (last - first)).log_softmax(-1)
        ids = torch.tensor(request.prompt[first:last], device=logprobs.device)
        values = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        tops = logprobs.topk(min(request.top_logprobs, logprobs.shape[1])) if request.top_logprobs else None
        for i, value in enumerate(values):
            top = [] if tops is None else list(zip(tops.values[i].tolist(), tops.indices[i].tolist(), strict=True))
            request.input_logprobs.append((value, top))

    def _sample(self, served: Served, requests: list[Request], hidden_ND: Tensor) -> None:
        sampled = [(r, i) for i, r in enumerate(requests) if r.params.max_new_tokens]
        for request in requests:
            if request.return_experts and request.prompt_experts is None:
                request.prompt_experts = self.cache.experts[request.slot, : len(request.prompt) - 1].copy()
            if not request.params.max_new_tokens:
                if request.exporting:
                    request.handover = self._export(request, served)
                request.version = served.version
                request.digests[str(served.version)] = served.digest
                self._finish_if_due(request)
        if not sampled:
            return
        eos = self.model.config.eos_token_ids
        rows = []
        for r, _ in sampled:
            early = len(r.output) < r.params.min_new_tokens
            banned = [t for t in r.params.stop_token_ids | eos if t < self.model.config.vocab_size] if early else []
            rows.append(Row(r.params, r.seed, r.length, banned, r.top_logprobs))
        drawn = sample(self.model.logits(served.weights, hidden_ND[[i for _, i in sampled]]), rows)
        for (request, _), token in zip(sampled, drawn, strict=True):
            if request.return_experts:
                request.output_experts.append(self.cache.experts[request.slot, request.length - 1].copy())
            request.add(token, served.version, served.digest)
            self.cache.append(request.slot, token.token)
            self.counters.generated_tokens += 1
            self._finish_if_due(request)

    def _export(self, request: Request, served: Served) -> Handover:
        count = len(request.prompt) - 1
        return Handover(
            served.version, served.digest, np.array(request.prompt[:-1], np.int32),
            self.cache.export(request.slot, count), self.cache.experts[request.slot, :count].copy(),
        )  # fmt: skip

    def _finish_if_due(self, request: Request) -> None:
        finish = request.check_finished(self.model.config.eos_token_ids, self.tokenizer, self.max_length)
        if finish is not None:
            self._finish(request, finish)
        elif request.stream and len(request.output) % request.params.stream_interval == 0:
            request.notify()

    def _finish(self, request: Request, finish: Finish) -> None:
        self._vacate(request)
        self.counters.finished[str(finish["type"])] += 1
        request.finish = finish  # last: whoever reads it finds the rest complete
        request.notify()

    def _vacate(self, request: Request) -> None:
        """Give the slot back; what is computed stays there as a prefix."""
        if request.slot < 0:
            return
        self.cache.release(request.slot)
        request.slot = -1

    def abort(self, rid: str | None, message: str) -> int:
        """End the request (None: all) with what it has -> how many were ended."""
        found = [r for r in (*self.running, *self.waiting) if rid is None or r.rid == rid]
        for request in found:
            self._finish(request, {"type": "abort", "message": message})
        self.running = [r for r in self.running if r.finish is None]
        self.waiting = deque(r for r in self.waiting if r.finish is None)
        return len(found)

    def retract(self) -> None:
        """Put running requests back in front of the queue with their tokens; their keys will be computed again."""
        for request in self.running:
            self._vacate(request)
        self.waiting.extendleft(reversed(self.running))
        self.running = []
        self.cache.forget()
