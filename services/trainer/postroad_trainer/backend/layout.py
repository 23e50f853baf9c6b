"""Rows to trees to micro-batches. Pure and deterministic: numpy only, no clock, no randomness.

A tree is one copy of a prompt followed by responses to it: [prompt, response 1, ..., response n]. Position j is
visible from i >= j when j is in the prompt or in i's own response; positions count on from the prompt in every
response, so a response is computed exactly as if its row stood alone. The last trained token of a row predicts
nothing and is not an input. A micro-batch is several trees one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from postroad_trainer.batch import TrainRow

PROMPT = 0


@dataclass(eq=False)
class Tree:
    """One prompt and its responses; t positions, p predictions.

    tokens, positions, segments: int64 [t] (segment 0 is the prompt). experts: [t, L, k] or None.
    source [p]: the position whose output predicts; target [p]: the token predicted;
    row [p], place [p]: which row of the batch and which of its tokens the target is.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    source: np.ndarray
    target: np.ndarray
    row: np.ndarray
    place: np.ndarray
    experts: np.ndarray | None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Limits:
    """How a batch is cut. Every micro-batch has a multiple of `positions` positions (they are split over tensor and
    context ranks), and their number is a multiple of `micro_batches` (interleaved pipelines need it)."""

    tree_tokens: int
    micro_batch_tokens: int
    share_prompts: bool = True
    positions: int = 1
    micro_batches: int = 1


@dataclass
class Plan:
    """The micro-batches of one rank, and what the plan says about the whole batch."""

    micro_batches: list[list[Tree]]
    computed_tokens: int
    prompts_not_shared: int


@dataclass
class _Span:
    """What of a row is computed: inputs [0, last), prompt [0, first)."""

    index: int
    row: TrainRow
    first: int = field(init=False)
    last: int = field(init=False)

    def __post_init__(self) -> None:
        trained = np.flatnonzero(self.row.loss_mask)
        self.first, self.last = int(trained[0]), int(trained[-1])

    @property
    def prompt(self) -> bytes:
        return self.row.tokens[: self.first].tobytes()

    @property
    def prompt_experts(self) -> bytes:
        routed = self.row.routed_experts
        return b"" if routed is None else routed[: self.first].tobytes()


def plan(rows: Sequence[tuple[int, TrainRow]], limits: Limits, replica: int = 0, replicas: int = 1) -> Plan:
    """The micro-batches of one data-parallel replica. Every replica gets equally many micro-batches."""
    trees, not_shared = build_trees(rows, limits.tree_tokens if limits.share_prompts else 0)
    budget = limits.micro_batch_tokens - limits.micro_batch_tokens % limits.positions
    packed = [_pack(share, budget) for share in _split(trees, replicas)]
    count = max(len(batches) for batches in packed)
    count += -count % limits.micro_batches
    mine = packed[replica]
    mine += [[_filler(trees[:1], 1)] for _ in range(count - len(mine))]
    for batch in mine:
        if missing := -sum(map(len, batch)) % limits.positions:
            batch.append(_filler(batch, missing))
    return Plan(mine, sum(map(len, trees)), not_shared)


def build_trees(rows: Sequence[tuple[int, TrainRow]], tree_tokens: int) -> tuple[list[Tree], int]:
    """Trees of at most tree_tokens positions (one row may exceed it alone; 0: a tree per row), and the number of rows
    whose recorded prompt experts differ from those of the first row of their group with that prompt."""
    leaders: dict[tuple[str, bytes], bytes] = {}
    families: dict[tuple[str, bytes, bytes], list[_Span]] = {}
    not_shared = 0
    for index, row in rows:
        span = _Span(index, row)
        leader = leaders.setdefault((row.group, span.prompt), span.prompt_experts)
        not_shared += span.prompt_experts != leader
        families.setdefault((row.group, span.prompt, span.prompt_experts), []).append(span)
    trees: list[Tree] = []
    for spans in families.values():
        branch: list[_Span] = []
        size = spans[0].first
        for span in spans:
            if branch and size + span.last - span.first > tree_tokens:
                trees.append(_tree(branch))
                branch, size = [], span.first
            branch.append(span)
            size += span.last - span.first
        trees.append(_tree(branch))
    return trees, not_shared


def _tree(spans: list[_Span]) -> Tree:
    prompt = spans[0].first
    routed = spans[0].row.routed_experts
    tokens, positions = [spans[0].row.tokens[:prompt]], [np.arange(prompt)]
    segments = [np.full(prompt, PROMPT)]
    experts = None if routed is None else [routed[:prompt]]
    source, target, row, place = [], [], [], []
    offset = prompt
    for number, span in enumerate(spans, start=1):
        length = span.last - prompt
        tokens.append(span.row.tokens[prompt : span.last])
        positions.append(np.arange(prompt, span.last))
        segments.append(np.full(length, number))
        if experts is not None:
            experts.append(span.row.routed_experts[prompt : span.last])  # type: ignore[index]
        trained = np.flatnonzero(span.row.loss_mask)
        # the input just before a target: the prompt's last position for the first token of a response
        source.append(np.where(trained == prompt, prompt - 1, trained - 1 - prompt + offset))
        target.append(span.row.tokens[trained])
        row.append(np.full(len(trained), span.index))
        place.append(trained)
        offset += length
    whole = [
        np.concatenate(part).astype(np.int64) for part in (tokens, positions, segments, source, target, row, place)
    ]
    return Tree(*whole, experts=None if experts is None else np.concatenate(experts))


def _filler(like: list[Tree], length: int) -> Tree:
    """Positions that predict nothing: they keep ranks in step and make lengths divide. Their experts are those of
    real positions, which are distinct and spread over the experts."""
    zeros, none = np.zeros(length, np.int64), np.zeros(0, np.int64)
    experts = None
    if like[0].experts is not None:
        experts = np.concatenate([tree.experts for tree in like])  # type: ignore[misc]
        experts = experts[np.arange(length) % len(experts)]
    return Tree(zeros, np.arange(length), zeros, none, none, none, none, experts)


def _split(trees: list[Tree], ranks: int) -> list[list[Tree]]:
    """Longest first to the rank that has least: the same on every rank."""
    shares: list[list[Tree]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for tree in sorted(trees, key=len, reverse=True):
        least = load.index(min(load))
        shares[least].append(tree)
        load[least] += len(tree)
    return shares


def _pack(trees: list[Tree], micro_batch_tokens: int) -> list[list[Tree]]:
    """Trees of like length side by side, because attention pads them to the longest of the micro-batch."""
    batches: list[list[Tree]] = []
    room = 0
    for tree in trees:
        if not batches or len(tree) > room:
            batches.append([])
            room = micro_batch_tokens
        batches[-1].append(tree)
        room -= len(tree)
    return batches
