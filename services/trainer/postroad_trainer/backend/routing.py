"""Rows with recorded experts beside rows without, or with a partly unknown recording (numpy only).

In a recording an unknown token has the largest value of its type (255, 65535) for every expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from postroad_trainer.batch import TrainRow, unknown_experts

UNKNOWN = -1


@dataclass(frozen=True)
class Routed:
    """Rows that all carry int32 experts, UNKNOWN where the router is to choose, or none of which does.

    unknown: input tokens without recorded experts, in a batch that has others; left_out: rows not run because of them.
    """

    rows: list[tuple[int, TrainRow]]
    unknown: int = 0
    left_out: int = 0


def routed(rows: Sequence[tuple[int, TrainRow]], shape: tuple[int, int], policy: str) -> Routed:
    """shape: (MoE layers, topk). policy "record": the router chooses for unknown tokens; "mask": their rows are left out."""
    if all(row.routed_experts is None for _, row in rows):
        return Routed(list(rows))
    kept, unknown, left_out = [], 0, 0
    for index, row in rows:
        experts = np.full((len(row.tokens) - 1, *shape), UNKNOWN, np.int32)
        if row.routed_experts is not None:
            recorded = ~unknown_experts(row.routed_experts)
            experts[recorded] = row.routed_experts[recorded]
        missing = int((experts[: np.flatnonzero(row.loss_mask)[-1], 0, 0] == UNKNOWN).sum())
        unknown += missing
        if missing and policy == "mask":
            left_out += 1
        else:
            kept.append((index, replace(row, routed_experts=experts)))
    return Routed(kept, unknown, left_out)
