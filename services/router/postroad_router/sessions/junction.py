"""The tokens between a turn and the next: rendered from the new messages alone, never from what the model said.

The new messages are rendered behind a stand-in for the conversation, once without and once with them. Where the second
text does not begin with the first, the template rewrites what was said before (it drops old thoughts, say): then there
is no junction, and the conversation has to be rendered anew, as a branch. A turn is closed by what the template writes
after an assistant's words, less what the model wrote of that itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from postroad_router.conversation import Asked, Message, for_template
from postroad_router.families import Family
from postroad_router.template import ChatTemplate, TemplateError, Vocabulary

WORDS = "⟦words⟧"
USER: Message = {"role": "user", "content": "0"}


@dataclass(frozen=True)
class Junction:
    """`text` goes behind the first tokens of the last turn, without its last one where `drop` is 1."""

    text: str
    drop: int = 0


class Junctions:
    """Of one model. `variables` of a request are laid over the family's."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary, family: Family) -> None:
        self._template, self.vocabulary, self._family = template, vocabulary, family
        self._tails: dict[str, str] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        prompt: bool = True,
    ) -> str:
        """The whole conversation's text, to be answered where `prompt`. Raises TemplateError."""
        return self._template.render(
            for_template(messages, self._family), tools=tools, add_generation_prompt=prompt,
            variables={**self._family.variables, **variables},
        )  # fmt: skip

    def after(self, answer: Message, thought: bool, end: str, new: Sequence[Message], asked: Asked) -> Junction | None:
        """What lies between `answer` and the model's next words; None where the template rewrites what came before.
        `end` is the answer's last token where that is a special one; `thought`: the conversation has reasoning in it."""
        stand_in: Message = {"role": "assistant", "content": "" if answer.get("tool_calls") else "0"}
        if thought:
            stand_in["reasoning_content"] = "0"
        if calls := answer.get("tool_calls"):
            stand_in["tool_calls"] = calls
        try:
            before = self.render([USER, stand_in], asked.tools, asked.variables, prompt=False)
            after = self.render([USER, stand_in, *new], asked.tools, asked.variables)
            tail = self.tail(asked.variables)
        except TemplateError:
            return None
        if not after.startswith(before):
            return None
        added = after[len(before) :]
        if end and end in self._family.reopens:
            return Junction(tail + added, drop=1)
        closed = before.rstrip()
        if end and closed.endswith(end):
            return Junction(before[len(closed) :] + added)
        return Junction(tail + added)

    def tail(self, variables: dict[str, Any]) -> str:
        """What the template writes after an assistant's words."""
        name = repr(sorted(variables.items(), key=lambda item: item[0]))
        if name not in self._tails:
            if len(self._tails) > 64:
                self._tails.clear()
            text = self.render([USER, {"role": "assistant", "content": WORDS}], None, variables, prompt=False)
            self._tails[name] = text.rpartition(WORDS)[2] if WORDS in text else ""
        return self._tails[name]
