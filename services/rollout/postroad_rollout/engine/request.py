"""One request: what was asked, what was generated, and its answer in SGLang's format."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .handover import Address, Handover
from .sampling import Drawn, SamplingParams

Finish = dict[str, Any]  # SGLang's finish_reason
SLACK = 8  # a stop string is looked for in the last len(stop) + SLACK tokens: bytes of one character may span several


@dataclass(eq=False)
class Request:
    """Written by the model loop; `notify` is called there after every token (stream) and at the end. `handover` is
    what another engine has computed of the prompt, or, at the end of one that is `exporting`, what this one did.

    The lists only grow and `logprobs` grows first, so that another thread may read a prefix at any time."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    notify: Callable[[], None]
    stream: bool = False
    return_logprob: bool = False
    logprob_start: int = -1
    top_logprobs: int = 0
    return_experts: bool = False
    experts_start: int = 0
    exporting: bool = False
    address: Address | None = None
    handover: Handover | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[Drawn] = field(default_factory=list)
    input_logprobs: list[tuple[float, list[tuple[float, int]]]] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    finish: Finish | None = None
    cached_tokens: int | None = None
    version: int = 0
    slot: int = -1
    prompt_experts: NDArray[Any] | None = None
    output_experts: list[NDArray[Any]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def wanted_input(self) -> range:
        """Prompt positions whose log-probability is wanted and not yet known (the first position has none)."""
        if not self.return_logprob or self.logprob_start < 0:
            return range(0)
        return range(max(self.logprob_start, 0) + 1 + len(self.input_logprobs), len(self.prompt))

    @property
    def reuse_limit(self) -> int:
        """How much of the sequence may come from another slot: all but what has to be computed for its logits."""
        wanted = self.wanted_input
        return min(self.length - 1, wanted.start - 1) if wanted else self.length - 1

    def add(self, drawn: Drawn, version: int, digest: str) -> None:
        """Append a token made by weights `version`."""
        if self.spans and self.spans[-1][2] == version:
            self.spans[-1][1] += 1
        else:
            self.spans.append([len(self.output), len(self.output) + 1, version])
        self.digests[str(version)] = digest
        self.version = version
        self.logprobs.append(drawn)
        self.output.append(drawn.token)

    def check_finished(self, eos: frozenset[int], tokenizer: Tokenizer | None, max_length: int) -> Finish | None:
        """Why the request ends now, or None; a stop at the last allowed token is a stop."""
        p = self.params
        if self.output and len(self.output) >= p.min_new_tokens:
            token = self.output[-1]
            if token in p.stop_token_ids or (token in eos and not p.ignore_eos):
                return {"type": "stop", "matched": token}
            if p.stop and tokenizer is not None:
                tail = self.output[-max(len(s) for s in p.stop) - SLACK :]
                text = tokenizer.decode(tail, skip_special_tokens=p.skip_special_tokens)
                matched = next((s for s in p.stop if s in text), None)
                if matched is not None:
                    return {"type": "stop", "matched": matched}
        if len(self.output) >= p.max_new_tokens or self.length >= max_length:
            return {"type": "length", "length": len(self.output)}
        return None

    def text(self, tokenizer: Tokenizer | None, output: list[int]) -> str:
        """The output's text; a matched stop is trimmed unless no_stop_trim."""
        if tokenizer is None:
            return ""
        matched = (self.finish or {}).get("matched")
        trim = matched is not None and not self.params.no_stop_trim
        if trim and isinstance(matched, int):
            output = output[:-1]
        text = str(tokenizer.decode(output, skip_special_tokens=self.params.skip_special_tokens))
        return text[: text.rfind(matched)] if trim and isinstance(matched, str) and matched in text else text

    def answer(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """The answer so far, as SGLang words it; complete once `finish` is set."""
        finish = self.finish  # read first: what is set before it is complete
        output = self.output[:]
        meta = self._meta(finish, len(output))
        if self.return_logprob:
            meta["output_token_logprobs"] = [[d.logprob, d.token, None] for d in self.logprobs[: len(output)]]
            meta["input_token_logprobs"] = self._input_logprobs()
            if self.top_logprobs:
                meta["output_top_logprobs"] = [_triples(d.top) for d in self.logprobs[: len(output)]]
                tops = [_triples(top) for _, top in self.input_logprobs]
                meta["input_top_logprobs"] = [None, *tops] if self.logprob_start >= 0 else []
        if self.return_experts and finish is not None:
            rows = self._routed_experts(0, len(output))
            meta["routed_experts"] = None if rows is None else base64.b64encode(rows.astype("<i4").tobytes()).decode()
        return {"text": self.text(tokenizer, output), "output_ids": output, "meta_info": meta}

    def news(self, sent: int) -> dict[str, Any]:
        """What came after the first `sent` tokens, in numbers alone: for msgpack."""
        finish = self.finish
        output = self.output[sent:]
        meta = self._meta(finish, sent + len(output))
        drawn = self.logprobs[sent : sent + len(output)]
        if self.return_logprob:
            meta["output_token_logprobs"] = [[d.logprob, d.token, None] for d in drawn]
            if self.top_logprobs:
                meta["output_top_logprobs"] = [_triples(d.top) for d in drawn]
        if self.return_experts:
            rows = self._routed_experts(sent, sent + len(output))
            if rows is not None:
                meta["routed_experts"] = {"dtype": rows.dtype.str, "shape": rows.shape, "data": rows.tobytes()}
        return {"output_ids": output, "meta_info": meta}

    def _meta(self, finish: Finish | None, generated: int) -> dict[str, Any]:
        return {
            "id": self.rid,
            "finish_reason": finish,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": generated,
            "cached_tokens": self.cached_tokens or 0,
            "weight_version": str(self.version),
            "weight_versions": [span[:] for span in self.spans],
            "weight_digests": dict(self.digests),
        }

    def _input_logprobs(self) -> list[list[Any]]:
        if self.logprob_start < 0:
            return []
        ids = self.prompt[self.logprob_start :]
        values = [None, *(value for value, _ in self.input_logprobs)]
        return [[value, token, None] for value, token in zip(values, ids, strict=False)]

    def _routed_experts(self, first: int, last: int) -> NDArray[Any] | None:
        """The rows [tokens, moe_layers, top_k] that output tokens first to last - 1 add, from `experts_start` on; with
        the first one those of the prompt come. None where nothing was computed.

        A token's row is that of the pass which predicted its successor; prompt rows are of the pass that predicted the
        first output token."""
        if self.prompt_experts is None:
            return None
        rows = self.prompt_experts if first == 0 else self.prompt_experts[:0]
        rows = np.concatenate([rows, *(row[None] for row in self.output_experts[first:last])])
        return rows[max(self.experts_start - (len(self.prompt) - 1 + first if first else 0), 0) :]


def _triples(top: list[tuple[float, int]]) -> list[list[Any]]:
    return [[value, token, None] for value, token in top]
