"""How a run is shown while it runs. The supervisor tells a view what happens; the view draws."""

from __future__ import annotations

import asyncio

from postroad.messages import Step
from postroad.supervisor.state import StateRecord


class View:
    """Shows nothing."""

    def changed(self, state: StateRecord) -> None:
        """The run, or a process of it, changed its state."""

    def step(self, step: Step, state: StateRecord) -> None:
        """The trainer logged a step."""

    def ended(self, state: StateRecord) -> None:
        """The run is over and nothing of it runs any more."""

    async def run(self) -> None:
        """Draw what moves by itself, until cancelled."""
        await asyncio.Event().wait()
