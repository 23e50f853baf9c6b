"""The live tensors of training by Hugging Face name, wherever this rank holds them.

Parameters, float32 masters and Adam moments of a parameter have its shape and are split in the same way, so the family's
mapping names the pieces of all of them; nothing depends on how the ranks were laid out. With the distributed optimizer
a rank owns a flat range of a parameter's master and moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from postroad_trainer.backend.parallel import Ranks
from postroad_trainer.models.family import Entry, Mapping

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Owned:
    """[start, stop) of a flattened parameter as the optimizer holds it, and the optimizer's state of all parameters."""

    start: int
    stop: int
    trained: torch.Tensor
    states: Any


class State:
    """Built from all entries of a rank, with the optimizer that trains them."""

    def __init__(self, entries: list[Entry], mapping: Mapping, optimizer: Any, ranks: Ranks) -> None:
        self.entries, self.mapping, self._ranks = entries, mapping, ranks
        self._parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
        self._owned = [self._find(entry.parameter) for entry in entries]
        ranges = torch.tensor([(own.start, own.stop) if own else (0, 0) for own in self._owned]).reshape(-1, 2)
        self._ranges = {
            expert: self._tell(ranges[[entry.expert == expert for entry in entries]], self._group(expert))
            for expert in (False, True)
        }

    def _find(self, parameter: torch.nn.Parameter) -> _Owned | None:
        for part in self._parts:
            if hasattr(part, "model_param_gbuf_map"):
                if parameter in part.model_param_group_index_map:
                    group, order = part.model_param_group_index_map[parameter]
                    held = part._get_model_param_range_map(parameter)["param"]
                    trained = part.optimizer.param_groups[group]["params"][order]
                    return _Owned(held.start, held.end, trained, part.optimizer.state)
                continue
            trained = getattr(parameter, "main_param", parameter)
            if any(trained is held for group in part.optimizer.param_groups for held in group["params"]):
                return _Owned(0, parameter.numel(), trained, part.optimizer.state)
        return None

    def _group(self, expert: bool) -> Any:
        return self._ranks.expert_replicas if expert else self._ranks.replicas

    @staticmethod
    def _tell(ranges: torch.Tensor, group: Any) -> list[list[list[int]]]:
        """[entry][replica] of (start, stop)."""
        if not len(ranges):
            return []
        device = torch.cuda.current_device()
        gathered = [torch.empty_like(ranges, device=device) for _ in range(group.size())]
        dist.all_gather(gathered, ranges.to(device).contiguous(), group=group)
        return torch.stack([part.cpu() for part in gathered], 1).tolist()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        steps = [float(own.states[own.trained]["step"]) for own in self._owned if own and own.trained in own.states]
        return int(max(steps, default=0))

    @staticmethod
    def kind(entry: Entry) -> str:
        """How a parameter is kept: a trained one of lower precision as its float32 master alone."""
        return "master" if entry.parameter.requires_grad and entry.parameter.dtype != torch.float32 else "parameter"

    @torch.no_grad()
    def pieces(self, step: int) -> Iterator[tuple[str, list[int], torch.Tensor]]:
        """(kind/name, [dim, start, length, full], tensor) of what this rank is to write: every piece of the model is
        written by one rank. All ranks iterate together."""
        seen = {False: 0, True: 0}
        for number, entry in enumerate(self.entries):
            place = seen[entry.expert]
            seen[entry.expert] += 1
            index = (self.mapping.expert_tensor if entry.expert else self.mapping.tensor)[0]
            if entry.copy or (index and not getattr(entry.parameter, "tensor_model_parallel", False)):
                continue
            own, pieces = self._owned[number], self.mapping.pieces(entry)
            kinds = [self.kind(entry)]
            kinds += MOMENTS if step and entry.parameter.requires_grad else ()
            for kind in kinds:
                if kind == "parameter":
                    whole = entry.parameter.detach() if self._writes(entry, place) else None
                else:
                    whole = self._whole(entry, place, own, kind)
                if whole is not None:
                    for piece, part in zip(pieces, self.mapping.split(entry, whole), strict=True):
                        yield f"{kind}/{piece.name}", [piece.dim, piece.start, piece.length, piece.full], part

    def _writes(self, entry: Entry, place: int) -> bool:
        group = self._group(entry.expert)
        return bool(place % group.size() == group.rank())

    def _whole(self, entry: Entry, place: int, own: _Owned | None, kind: str) -> torch.Tensor | None:
        """The master or a moment of a whole local parameter on the replica that writes it; None on the others."""
        group = self._group(entry.expert)
        writer = place % group.size()
        ranges = self._ranges[entry.expert][place]
        mine = None
        if own is not None:
            mine = own.trained if kind == "master" else own.states[own.trained][kind]
            if (own.start, own.stop) == (0, entry.parameter.numel()) and group.rank() == writer:
                return mine.detach().reshape(entry.parameter.shape)
        if ranges[writer] == [0, entry.parameter.numel()]:
            return None
        if group.rank() != writer:
            if mine is not None:
                dist.send(mine.detach().reshape(-1).contiguous(), dist.get_global_rank(group, writer))
            return None
        flat = torch.empty(entry.parameter.numel(), dtype=torch.float32, device=entry.parameter.device)
        for replica, (start, stop) in enumerate(ranges):
            if stop > start and replica == writer:
                assert mine is not None
                flat[start:stop] = mine.reshape(-1)
            elif stop > start:
                part = torch.empty(stop - start, device=flat.device)
                dist.recv(part, dist.get_global_rank(group, replica))
                flat[start:stop] = part
        return flat.view(entry.parameter.shape)

    @torch.no_grad()
    def restore(self, read: Any, step: int) -> None:
        """Puts saved tensors in place. read(kind, entry): the saved value of the whole local parameter."""
        for number, entry in enumerate(self.entries):
            value = read(self.kind(entry), entry)
            entry.parameter.copy_(value)
            own = self._owned[number]
            if own is None:
                continue
            if self.kind(entry) == "master":
                own.trained.copy_(value.reshape(-1)[own.start : own.stop].view_as(own.trained))
            own.states.pop(own.trained, None)
            if step:
                moments = {
                    kind: read(kind, entry)
                    .reshape(-1)[own.start : own.stop]
                    .view_as(own.trained)
                    .to(own.trained, copy=True)
                    for kind in MOMENTS
                }
                own.states[own.trained] = {"step": torch.tensor(float(step), device=own.trained.device), **moments}
