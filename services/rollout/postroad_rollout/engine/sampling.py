"""Sampling parameters and the batched sampler.

Reported log-probabilities are log_softmax(logits / temperature), of the logits alone at temperature 0, before top-k,
top-p, min-p and min_new_tokens narrow the choice: what a trainer computes at the same temperature.

The random number of a token is a hash of (sampling_seed, position in the sequence), one uniform per token, turned into
a token by inverting the cumulative distribution. So a request's draws depend neither on its neighbours nor on whether
it was cut off and went on elsewhere with the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

TOP_CANDIDATES = 512  # sorted first; the whole vocabulary is sorted only where these don't decide
BLOCK = 256


class SamplingParams(BaseModel):
    """SGLang's names. `stop` needs a tokenizer; `stop_token_ids` hold under `ignore_eos` too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=-1, description="-1: off")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    max_new_tokens: int = Field(default=128, ge=0)
    min_new_tokens: int = Field(default=0, ge=0)
    stop: list[str] = Field(default_factory=list, max_length=16)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    sampling_seed: int | None = Field(default=None, ge=0, lt=2**63)
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    spaces_between_special_tokens: bool = True
    stream_interval: int = Field(default=1, ge=1, description="tokens between two events of a stream")
    n: int = Field(default=1, ge=1, le=1, description="send a batch of input_ids instead")
    frequency_penalty: float = Field(default=0.0, ge=0.0, le=0.0)
    presence_penalty: float = Field(default=0.0, ge=0.0, le=0.0)
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k == 0 or self.top_k < -1:
            raise ValueError(f"top_k is {self.top_k}; give -1 (off) or at least 1")
        if "" in self.stop:
            raise ValueError("stop contains an empty string; remove it")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        return self

    @property
    def truncated(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Row:
    """One row to sample: its parameters, seed, the position of the new token, and tokens that are not allowed yet."""

    params: SamplingParams
    seed: int
    position: int
    banned: list[int]
    top_logprobs: int


@dataclass(frozen=True)
class Drawn:
    token: int
    logprob: float
    top: list[tuple[float, int]]


def scaled_logits(logits_NV: Tensor, temperatures: list[float]) -> Tensor:
    """Divide each row by its temperature (0 counts as 1), in place."""
    scale = torch.tensor([t or 1.0 for t in temperatures], device=logits_NV.device)
    return logits_NV if bool((scale == 1).all()) else logits_NV.div_(scale[:, None])


def uniforms(seeds: list[int], positions: list[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): two rounds of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = np.array(seeds, np.uint64)
    with np.errstate(over="ignore"):
        for extra in (np.zeros(len(seeds), np.uint64), np.array(positions, np.uint64)):
            x = x + extra + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first entry whose cumulative float64 mass exceeds `target` [N] in `mass` [N, M], and what is left
    of the target inside this entry. The entry always has mass."""
    cumulative = mass.double().cumsum(1)
    target = torch.minimum(target, cumulative[:, -1] * (1 - 1e-12))
    index = torch.searchsorted(cumulative, target[:, None], right=True).clamp_(max=mass.shape[1] - 1)
    before = cumulative.gather(1, index)[:, 0] - mass.gather(1, index)[:, 0].double()
    return index[:, 0], (target - before).clamp_(min=0)


@torch.inference_mode()
def sample(logits_NV: Tensor, rows: list[Row]) -> list[Drawn]:
    """Draw one token for every row of float32 logits (changed in place)."""
    scaled = scaled_logits(logits_NV, [r.params.temperature for r in rows])
    peak = scaled.amax(1, keepdim=True)
    size = scaled.shape[1]
    mass = (scaled - peak).exp_()
    total = _blocks(mass).sum(-1).double().sum(1)
    log_total = peak[:, 0].double() + total.log()
    tops = _top_logprobs(scaled, log_total, [r.top_logprobs for r in rows])
    allowed = scaled
    if any(r.banned for r in rows):
        allowed = scaled.clone()
        for i, row in enumerate(rows):
            allowed[i, row.banned] = float("-inf")
            mass[i, row.banned] = 0.0
    u = torch.from_numpy(uniforms([r.seed for r in rows], [r.position for r in rows])).to(scaled.device)
    tokens = torch.empty(len(rows), dtype=torch.long, device=scaled.device)
    kinds = ["greedy" if r.params.temperature == 0 else "cut" if r.params.truncated else "full" for r in rows]
    for kind in set(kinds):
        index = torch.tensor([i for i, k in enumerate(kinds) if k == kind], device=scaled.device)
        if kind == "greedy":
            tokens[index] = allowed[index].argmax(1)
        elif kind == "full":
            tokens[index] = _draw(mass if len(index) == len(rows) else mass[index], u[index])
        else:
            tokens[index] = _draw_truncated(mass[index], u[index], [rows[i].params for i in index.tolist()])
    tokens.clamp_(max=size - 1)
    logprobs = (scaled.gather(1, tokens[:, None])[:, 0].double() - log_total).tolist()
    return [Drawn(*drawn) for drawn in zip(tokens.tolist(), logprobs, tops, strict=True)]


def _blocks(mass: Tensor) -> Tensor:
    """[N, V] -> [N, blocks, BLOCK], padded with zeros."""
    rest = -mass.shape[1] % BLOCK
    return (torch.nn.functional.pad(mass, (0, rest)) if rest else mass).view(len(mass), -1, BLOCK)


def _draw(mass: Tensor, u: Tensor) -> Tensor:
    """Invert the distribution in two levels (blocks, then within one): exact, and no cumulative sum over V."""
    blocks = _blocks(mass)
    sums = blocks.sum(-1)
    block, left = invert(sums, u * sums.double().sum(1))
    inner, _ = invert(blocks[torch.arange(len(mass)), block], left)
    return block * BLOCK + inner


def _draw_truncated(mass: Tensor, u: Tensor, params: list[SamplingParams]) -> Tensor:
    """Keep the first top_k, then those before the mass top_p is reached, then those above min_p of the peak."""
    size = mass.shape[1]
    total = mass.double().sum(1, keepdim=True)
    limits = [size if p.top_k < 1 else p.top_k for p in params]
    top_k, top_p, min_p = (
        torch.tensor(column, device=mass.device)[:, None]
        for column in (limits, [p.top_p for p in params], [p.min_p for p in params])
    )
    for candidates in (min(TOP_CANDIDATES, size), size):
        values, ids = mass.topk(candidates, sorted=True)
        before = values.double().cumsum(1) - values.double()
        keep = torch.arange(candidates, device=mass.device)[None] < top_k
        keep &= (before <= top_p * total) & (values >= min_p * values[:, :1])
        if candidates == size or not bool(keep[:, -1].any()):
            break
    values = values.masked_fill(~keep, 0.0)
    index, _ = invert(values, u * values.double().sum(1))
    return ids.gather(1, index[:, None])[:, 0]


def _top_logprobs(scaled: Tensor, log_total: Tensor, counts: list[int]) -> list[list[tuple[float, int]]]:
    tops: list[list[tuple[float, int]]] = []
    for row, norm, count in zip(scaled, log_total.tolist(), counts, strict=True):
        values, ids = row.topk(min(count, len(row))) if count else (row[:0], row[:0])
        tops.append([(value - norm, int(i)) for value, i in zip(values.tolist(), ids.tolist(), strict=True)])
    return tops
