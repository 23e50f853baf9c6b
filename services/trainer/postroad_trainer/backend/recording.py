"""The experts that the routers of all ranks chose in a pass, put together by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from postroad_trainer.backend.layout import Tree
from postroad_trainer.backend.parallel import Ranks
from postroad_trainer.backend.visibility import Stripe
from postroad_trainer.batch import TrainRow


def chosen_experts(
    micro_batches: Sequence[list[Tree]],
    kept: dict[int, list[torch.Tensor]],
    rows: Sequence[TrainRow],
    shape: tuple[int, int],
    ranks: Ranks,
    sequence_parallel: bool,
) -> list[np.ndarray]:
    """uint16 [T-1, MoE layers, topk] by row, the largest number where a token was no input of the pass.

    Every tree must hold one row. kept: by MoE layer, this rank's choices [local tokens, topk] in each micro-batch.
    shape: (MoE layers, topk).
    """
    starts = np.cumsum([0, *(len(row.tokens) - 1 for row in rows)])
    device = torch.cuda.current_device()
    found = torch.zeros(
        int(starts[-1]), *shape, dtype=torch.int64, device=device
    )  # expert + 1: ranks' parts are summed
    for number, trees in enumerate(micro_batches):
        places = [
            starts[tree.row[0]] + np.arange(len(tree)) if len(tree.row) else np.full(len(tree), -1) for tree in trees
        ]
        place = Stripe(ranks.context.rank(), ranks.context.size()).of(torch.from_numpy(np.concatenate(places)))
        if sequence_parallel:
            place = place.chunk(ranks.tensor.size())[ranks.tensor.rank()]
        place = place.to(device)
        for layer, choices in kept.items():
            found[place[place >= 0], layer] = choices[number][place >= 0] + 1
    whole = (ranks.over_world(found) - 1).cpu().numpy().astype(np.uint16)  # -1 becomes the largest number
    return np.split(whole, starts[1:-1])
