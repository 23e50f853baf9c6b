"""What the other members of a group did, for agents that go on from that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from postroad.bus import Bus
from postroad.messages import Task, Trajectory
from postroad_rollout.worker.errors import PeerFailed


class Peers:
    """`missing` members are attempted now; the trajectories of the others are in the log, as those of all will be."""

    def __init__(self, bus: Bus, task: Task, missing: Iterable[int]) -> None:
        self._bus, self._task = bus, task
        self._running: dict[int, asyncio.Future[bool]] = {
            member: asyncio.get_running_loop().create_future() for member in missing
        }

    def ended(self, member: int, published: bool) -> None:
        self._running[member].set_result(published)

    async def trajectory(self, member: int) -> Trajectory:
        """The member's trajectory, as soon as it is in the log. Raises PeerFailed."""
        if member in self._running and not await asyncio.shield(self._running[member]):
            raise PeerFailed(f"member {member} of {self._task.group}, which others wait for, failed")
        logged = await self._bus.last("TRAJECTORIES", self._bus.subjects.trajectory(self._task.group, member))
        if logged is None or not isinstance(logged.message, Trajectory):
            raise PeerFailed(f"the log holds no trajectory of member {member} of {self._task.group}")
        return logged.message
