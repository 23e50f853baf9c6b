"""Several roles of one model in a group: solvers, rewriters who see the solutions, a selector who sees the rewrites.

Each role is a member of its own, with its own trajectory and reward (the grader multi_agent), so what a crash leaves in the
log is not made again: whoever comes next reads it there.
"""

from __future__ import annotations

from typing import Any

from postroad.config import Recipe
from postroad.messages import Task
from postroad_rollout.worker.agents.base import Attempt, recorded
from postroad_rollout.worker.errors import AgentSettingsError
from postroad_rollout.worker.model_client import ModelClient

REWRITE = (
    "Here are solutions by others; some may be wrong. Find their mistakes and write one better solution of your own."
)
SELECT = "Here are solutions. Decide which one is right and end with a line `Judgment: NUMBER`, its number."


class MultiAgent:
    """A group is made of teams: `solvers`, then `rewriters`, then one selector, by member. An evaluation's one member is
    a solver."""

    def __init__(self, solvers: int = 2, rewriters: int = 2) -> None:
        if solvers < 1 or rewriters < 1:
            raise AgentSettingsError(f"multi_agent needs solvers and rewriters, not {solvers} and {rewriters}")
        self.solvers, self.rewriters = solvers, rewriters
        self.team = solvers + rewriters + 1

    def check(self, recipe: Recipe) -> None:
        settings = recipe.reward.settings
        if recipe.rollout.group_size % self.team:
            raise AgentSettingsError(
                f"rollout.group_size {recipe.rollout.group_size} must be a multiple of {self.team}: {self.solvers} solvers, "
                f"{self.rewriters} rewriters and a selector"
            )
        counts = (settings.get("solvers", 2), settings.get("rewriters", 2))
        if recipe.reward.grader == "multi_agent" and counts != (self.solvers, self.rewriters):
            raise AgentSettingsError(
                f"the agent and reward.settings must have the same solvers and rewriters, not {counts}"
            )

    async def run(self, task: Task, model: ModelClient) -> Attempt:
        place = model.member % self.team
        first = model.member - place
        if place < self.solvers:
            prompt = task.prompt
        elif place < self.team - 1:
            prompt = await self._prompt(task, model, REWRITE, range(first, first + self.solvers))
        else:
            prompt = await self._prompt(task, model, SELECT, range(first + self.solvers, first + self.team - 1))
        await model.complete(prompt)
        return await recorded(model)

    async def _prompt(self, task: Task, model: ModelClient, asked: str, members: range) -> list[dict[str, Any]]:
        """The task's prompt, whose last message is followed by what is asked and by the members' answers."""
        answers = [(await model.peers.trajectory(member)).response.rpartition("</think>")[2] for member in members]
        listed = "\n\n".join(f"Solution {number}:\n{answer.strip()}" for number, answer in enumerate(answers, 1))
        last = task.prompt[-1]
        return [*task.prompt[:-1], {**last, "content": f"{last['content']}\n\n{asked}\n\n{listed}"}]
