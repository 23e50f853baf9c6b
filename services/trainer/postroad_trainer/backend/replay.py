"""Routing replay: the recorded experts decide in the trainer's forward and recompute too.

megatron's RouterReplay replaces only the choice; the weights of the chosen experts come from this pass's scores, so
gradients flow through the router. What is added here: each micro-batch feeds the routers of its own chunk (megatron's
static setter feeds all that were ever built); the recompute of activation checkpointing reads the oldest unread choice
(megatron has no hook there under 1F1B); where nothing is recorded the router chooses, once, for both; the choices of a
pass can be kept; and the trainer's own choice is compared with the recorded one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as state
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.router_replay import RouterReplay

from postroad_trainer.backend.routing import UNKNOWN


class ExpertReplay(RouterReplay):
    """The choice of one router. Without a target, and where it is UNKNOWN, the router chooses for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: torch.Tensor | None = None
        self.kept: list[torch.Tensor] | None = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Any, Any]:
        if is_checkpointing() and torch.is_grad_enabled():  # the forward runs again
            chosen = self.replay_backward_list.pop(0)
            return scores.gather(1, chosen), chosen
        chosen = default_compute_topk(scores, topk, num_groups, group_topk)[1]
        if self.target_topk_idx is not None:
            chosen = self._replayed(chosen, self.target_topk_idx)
        if is_checkpointing():
            self.replay_backward_list.append(chosen)
        if self.kept is not None:
            self.kept.append(chosen)
        return scores.gather(1, chosen), chosen

    def _replayed(self, own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.shape != own.shape:
            raise AssertionError(f"experts of shape {tuple(target.shape)} for a router's {tuple(own.shape)}")
        known = target[:, 0] != UNKNOWN
        same = (own.sort(1).values == target.sort(1).values).all(1)
        counts = torch.stack([(known & ~same).sum(), known.sum()])
        self.counts = counts if self.counts is None else self.counts + counts
        return torch.where(known[:, None], target, own)


class ExpertReplays:
    """The routers of one model chunk. `rows` maps each to its place among the MoE layers of the whole model."""

    def __init__(self, chunk: Any) -> None:
        self._sequence_parallel = chunk.config.sequence_parallel
        self.rows: dict[int, ExpertReplay] = {}
        for module in chunk.modules():
            if getattr(module, "router_replay", None) is not None:
                replay = ExpertReplay()
                module.router_replay = replay
                self.rows[sum(chunk.config.moe_layer_freq[: module.layer_number - 1])] = replay
        # The class keeps every instance alive for its static setters, which are not used here.
        RouterReplay.clear_global_router_replay_instances()

    def feed(self, experts_TLK: torch.Tensor | None) -> None:
        """The choices of the next forward, int64 [T, MoE layers of the model, topk] of this context rank's positions;
        None: the routers choose."""
        if experts_TLK is not None and self._sequence_parallel:
            parts = experts_TLK.chunk(state.get_tensor_model_parallel_world_size())
            experts_TLK = parts[state.get_tensor_model_parallel_rank()]
        for row, replay in self.rows.items():
            replay.target_topk_idx = None if experts_TLK is None else experts_TLK[:, row].contiguous()

    def keep(self, keep: bool) -> dict[int, list[torch.Tensor]]:
        """Starts or ends the keeping of choices; those that were kept, by row: [local tokens, topk] of each pass."""
        kept = {row: replay.kept or [] for row, replay in self.rows.items()}
        for replay in self.rows.values():
            replay.kept = [] if keep else None
        return kept

    def take_counts(self) -> torch.Tensor:
        """int64 [2]: (tokens x layers where the own choice was another set, compared ones) since the last call."""
        counts = [replay.counts for replay in self.rows.values() if replay.counts is not None]
        for replay in self.rows.values():
            replay.counts = None
            replay.clear_indices()
        return torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.int64)
