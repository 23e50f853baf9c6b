"""From given conversations to samples: nothing is generated, the answers are the data's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from postroad.config import Recipe
from postroad.messages import RewardSpec, Sample, Sampling, Task, Trajectory, VersionSpan
from postroad.messages.trajectory import trajectory_id
from postroad_trainer.data.dataset import DataError, Messages, Row

ANSWERS = (1.0, 0.0)  # the rewards of dpo's pair: the better answer and the worse one


class Conversations:
    """Renders conversations by the model's chat template, with a mask of what the assistant says."""

    def __init__(self, recipe: Recipe, model: Path) -> None:
        from transformers import AutoTokenizer

        self._recipe = recipe
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._template = recipe.model.chat_template or self._tokenizer.chat_template
        if not self._template:
            raise DataError(f"{model} has no chat template: set model.chat_template")

    def encode(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """int32 [T] tokens, and uint8 [T], 1 for those of assistant messages and of the token that ends each. A message
        with `weight: 0` isn't trained (OpenAI's format). Raises DataError for a conversation without a trained token."""
        text = self._render(messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        mask = np.zeros(len(starts), bool)
        for start, end in self._spans(messages, text):
            mask |= (starts >= start) & (starts < end) & (ends > starts)
        mask[:1] = False  # nothing comes before it to predict it from
        if not mask.any():
            raise DataError(f"no assistant message is to be trained in {str(messages)[:120]}")
        return np.array(encoded["input_ids"], np.int32), mask.astype(np.uint8)

    def _spans(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """[start, end) in the text of every trained assistant message with its end token."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            before, until = self._render(messages[:index], prompt=True), self._render(messages[: index + 1])
            if not (until.startswith(before) and text.startswith(until)):
                raise DataError(
                    f"the chat template renders message {index} in another way once more follow, so its tokens can't be told "
                    f"from the rest: give each turn a row of its own, with weight 0 for the earlier ones ({until[-60:]!r})"
                )
            said = until[len(before) :].rstrip()
            closed = not said.endswith(str(message["content"]).rstrip())  # by an end token, which what follows it isn't
            spans.append((len(before), len(before) + len(said) if closed else len(until)))
        return spans

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [{key: value for key, value in message.items() if key != "weight"} for message in messages],
                chat_template=self._template, add_generation_prompt=prompt, tokenize=False,
            )
        ) if messages or prompt else ""  # fmt: skip

    def samples(self, row: Row, run: str, group: str, version: int) -> list[Sample]:
        """The group of a row: its conversation, or for dpo the better and the worse one (data.prompt_key, data.label_key)."""
        if self._recipe.trainer.algorithm.name == "sft":
            return [self._sample(row, row.prompt, (run, group), 0, version)]
        worse = row.label
        if not isinstance(worse, list) or not all(isinstance(m, dict) and "role" in m for m in worse):
            raise DataError(
                f"row {row.id}: {self._recipe.data.label_key!r} must be the worse conversation, chat messages"
            )
        return [
            self._sample(row, row.prompt, (run, group), 0, version), self._sample(row, worse, (run, group), 1, version)
        ]  # fmt: skip

    def _sample(self, row: Row, messages: Messages, place: tuple[str, str], member: int, version: int) -> Sample:
        run, group = place
        tokens, mask = self.encode(messages)
        task = Task(
            run=run, id=group, prompt=messages[:-1], members=self._recipe.group_size, sampling=Sampling(),
            agent={"kind": "given"}, reward=RewardSpec(grader="none"), row=row.id, deadline=time.time(),
            minimum_version=version,
        )  # fmt: skip
        name = trajectory_id(group, member)
        trajectory = Trajectory(
            run=run, id=name, member=member, task=task, tokens=tokens, loss_mask=mask,
            log_probabilities=np.zeros(len(tokens), np.float32),
            versions=[VersionSpan(start=0, end=len(tokens), version=version)], messages=messages, finish_reason="stop",
        )  # fmt: skip
        return Sample(run=run, id=name, trajectory=trajectory, reward=ANSWERS[member])
