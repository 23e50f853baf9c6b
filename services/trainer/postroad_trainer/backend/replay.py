"""Routing replay: the experts recorded at inference decide in the trainer's forward and recompute too.

megatron's RouterReplay replaces only the choice; the weights of the chosen experts come from this pass's scores, so
gradients flow through the router. Three things are added here: each micro-batch feeds the routers of its own model
(megatron's static setter feeds all that were ever built), the recompute of activation checkpointing reads the
oldest unread choice, and the trainer's own choice is compared with the recorded one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.router_replay import RouterReplay


class ExpertReplay(RouterReplay):
    """The choice of one router. Without a target the router chooses for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.differing = 0
        self.compared = 0

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Any, Any]:
        recompute = is_checkpointing() and torch.is_grad_enabled()
        if recompute and self.replay_backward_list:
            target = self.replay_backward_list.pop(0)
        elif self.target_topk_idx is not None and not recompute:
            target = self.target_topk_idx
            if not is_checkpointing():
                self.replay_backward_list.pop()  # no recompute will come to read it
            self._compare(scores.detach(), target)
        else:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        return scores.gather(1, target), target

    def _compare(self, scores: torch.Tensor, target: torch.Tensor) -> None:
        own = scores.topk(target.shape[1], dim=1).indices
        same = (own.sort(1).values == target.sort(1).values).all(1)
        self.differing += int((~same).sum())
        self.compared += len(target)


class ExpertReplays:
    """The routers of one model chunk, in the order of their layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._replays: list[ExpertReplay] = []
        for module in model.modules():
            if getattr(module, "router_replay", None) is not None:
                replay = ExpertReplay()
                replay.layer_number = module.layer_number
                module.router_replay = replay
                self._replays.append(replay)
        self._replays.sort(key=lambda replay: replay.layer_number or 0)
        # The class keeps every instance alive for its static setters, which are not used here.
        RouterReplay.clear_global_router_replay_instances()

    @property
    def layers(self) -> int:
        return len(self._replays)

    def feed(self, experts_TLK: torch.Tensor | None) -> None:
        """The choices of the next forward, int64 [T, layers, topk]; None: the routers choose."""
        for layer, replay in enumerate(self._replays):
            if experts_TLK is None:
                replay.target_topk_idx = None
            else:
                replay.set_target_indices(experts_TLK[:, layer].contiguous())

    def take_counts(self) -> tuple[int, int]:
        """(token-layers where the own choice was another set, token-layers compared) since the last call."""
        differing = sum(replay.differing for replay in self._replays)
        compared = sum(replay.compared for replay in self._replays)
        for replay in self._replays:
            replay.clear_indices()
            replay.differing = replay.compared = 0
        return differing, compared
