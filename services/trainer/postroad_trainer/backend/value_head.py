"""The critic of PPO: a model with a value head in the place of its vocabulary."""

from __future__ import annotations

import torch

from postroad_trainer.backend.construction import BuiltModel
from postroad_trainer.backend.settings import BackendError, BackendSettings
from postroad_trainer.models.family import Entry


def add_value_head(settings: BackendSettings, built: BuiltModel) -> list[Entry]:
    """A linear value head on the last pipeline stage, 0 at first, and its entries. Its gradient isn't split over tensor
    ranks: raises BackendError for more than one."""
    if settings.parallel.tensor > 1:
        raise BackendError(
            f"the critic of ppo can't be split over {settings.parallel.tensor} tensor ranks: set trainer.parallel.tensor to 1"
        )
    last = built.chunks[-1]
    if not last.post_process:
        return []
    device = next(last.parameters()).device
    last.value_head = torch.nn.Linear(built.config.hidden_size, 1, dtype=built.config.params_dtype, device=device)
    for parameter in last.value_head.parameters():
        torch.nn.init.zeros_(parameter)
    return [
        Entry(parameter, "plain", (f"value_head.{name}",)) for name, parameter in last.value_head.named_parameters()
    ]
