"""Agents whose model calls a tool by a tag in its text: ReTool (Feng et al. 2025) and Search-R1 (Jin et al. 2025).

The closing tag ends the turn, and the result comes as the next message, in tags too; so a session stays exact to the
token, and what the model did not write has mask 0. The papers put the result into the same turn instead.
"""

from __future__ import annotations

import re
from typing import ClassVar

from postroad.config import Recipe
from postroad.messages import Task
from postroad_rollout.worker.agents.base import Attempt, Conversation, check_tool
from postroad_rollout.worker.model_client import ModelClient


class Tagged:
    """At most `max_turns` turns. `tool` is called with what stands in the tag, as its argument `argument`."""

    tag: ClassVar[str]
    argument: ClassVar[str]
    result: ClassVar[str]

    def __init__(self, max_turns: int, tool: str) -> None:
        self.max_turns, self.tool = max_turns, tool
        self._asked = re.compile(rf"<{self.tag}>(.*?)(?:</{self.tag}>|\Z)", re.DOTALL)

    def check(self, recipe: Recipe) -> None:
        check_tool(recipe, self.tool)

    async def run(self, task: Task, model: ModelClient) -> Attempt:
        talk = Conversation(task, model)
        for turn in range(1, self.max_turns + 1):
            said = await talk.turn(stop=(f"</{self.tag}>",))
            if said is None or turn == self.max_turns or (reply := await self.reply(talk, said.text)) is None:
                break
            talk.messages.append({"role": "user", "content": reply})
        return await talk.attempt()

    async def reply(self, talk: Conversation, text: str) -> str | None:
        """What the model is told after `text`; None where it has answered."""
        asked = self._asked.search(text)
        if asked is None:
            return self.otherwise(text)
        result = await talk.call(self.tool, {self.argument: asked[1].strip()})
        return f"<{self.result}>\n{result.content}\n</{self.result}>"

    def otherwise(self, text: str) -> str | None:
        return None


class ReTool(Tagged):
    """Code between <code> tags is run, what it prints comes back between <interpreter> tags; an answer has no code."""

    tag, argument, result = "code", "code", "interpreter"

    def __init__(self, max_turns: int = 16, tool: str = "python") -> None:
        super().__init__(max_turns, tool)

    async def reply(self, talk: Conversation, text: str) -> str | None:
        return await super().reply(
            talk, re.sub(r"<code>\s*```(?:python)?\n(.*?)```\s*", r"<code>\1", text, flags=re.DOTALL)
        )


class SearchR1(Tagged):
    """A query between <search> tags is searched for, documents come back between <information> tags; the answer stands
    between <answer> tags, and a turn with neither is told so."""

    tag, argument, result = "search", "query", "information"

    def __init__(self, max_turns: int = 4, tool: str = "search") -> None:
        super().__init__(max_turns, tool)

    def otherwise(self, text: str) -> str | None:
        if "<answer>" in text:
            return None
        return (
            "That was neither a search nor an answer. Write <search>what to look for</search>, or, when you know it, "
            "<answer>the answer</answer>."
        )
