"""The seam between what clients ask and what engines do: one request in tokens, and the chunks that answer it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """Generate one continuation of `prompt` (token ids). No token may come from weights older than
    `minimum_version`, or from others than `version` where it is given; all of it, retries included, may take
    `timeout_s`. Requests of one `session` go to the same engine as long as it can take them. Of the routed experts
    the first `experts_known` rows are with the caller already and are not answered again."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    timeout_s: float
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    top_logprobs: int = 0
    json_schema: str = ""  # the text has to fit it; for engines that say so in their registration
    routed_experts: bool = False
    experts_known: int = 0
    minimum_version: int = 0
    version: int | None = None
    session: str = ""
    stream_interval: int = 1  # tokens between two chunks: more where nobody watches them come

    def allows(self, version: int) -> bool:
        return version >= self.minimum_version and self.version in (None, version)

    @property
    def versions_asked(self) -> str:
        return f"{self.minimum_version} or newer" if self.version is None else f"{self.version} alone"


@dataclass(frozen=True)
class TokenChunk:
    """The next tokens. All lists are aligned to `tokens`; `top` is empty unless top_logprobs were asked for.
    The last chunk has `finish`, and where routed experts were asked for `routed_experts`, [prompt + generated - 1 -
    experts_known, MoE layers, top-k], and `unmatched`: the generated tokens whose row is not known to be that of the pass
    which sampled them. They are not to be trained on."""

    tokens: list[int]
    log_probabilities: list[float]
    versions: list[int]
    engine: str
    top: list[list[tuple[float, int]]] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    finish: Finish | None = None
    routed_experts: np.ndarray | None = None
    unmatched: tuple[int, ...] = ()


def version_spans(versions: list[int]) -> list[tuple[int, int, int]]:
    """Per-token versions as [start, end) spans: (start, end, version)."""
    spans: list[tuple[int, int, int]] = []
    for position, version in enumerate(versions):
        if spans and spans[-1][2] == version:
            spans[-1] = (spans[-1][0], position + 1, version)
        else:
            spans.append((position, position + 1, version))
    return spans
