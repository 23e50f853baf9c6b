"""Which tokens of a given conversation are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from postroad.config import Recipe
from postroad_trainer.data import Conversations, DataError, Row
from postroad_trainer.models.tiny import write_tiny_model

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "It is 4"},
]
# a template that leaves thoughts out of earlier turns, as those of reasoning models do
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}said{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "llama")
    return folder


def conversations(model: Path, algorithm: Any = "sft", template: str | None = None) -> Conversations:
    return Conversations(
        Recipe.model_validate(
            {
                "model": {"path": str(model), "chat_template": template},
                "data": {"kind": "file", "path": "x.jsonl", "prompt_key": "chosen", "label_key": "rejected"},
                "trainer": {"steps": 1, "algorithm": algorithm},
            }
        ),
        model,
    )


def trained_text(model: Path, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The stretches of trained tokens as text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0]))))
    return [tokenizer.decode(tokens[start:end]) for start, end in edges.reshape(-1, 2)]


def test_the_assistant_is_trained_with_its_end_token_and_nobody_else(model: Path) -> None:
    tokens, mask = conversations(model).encode(TALK)
    assert trained_text(model, tokens, mask) == ["2<|im_end|>", "It is 4<|im_end|>"]
    whole = AutoTokenizer.from_pretrained(model).apply_chat_template(TALK, tokenize=False)
    assert AutoTokenizer.from_pretrained(model).decode(tokens) == whole


def test_a_message_of_weight_0_is_not_trained(model: Path) -> None:
    talk = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    assert trained_text(model, *conversations(model).encode(talk)) == ["It is 4<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedy(model: Path) -> None:
    given = conversations(model, template=REWRITING)
    with pytest.raises(DataError, match="message 2 .* weight 0"):
        given.encode(TALK)
    talk = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    assert trained_text(model, *given.encode(talk)) == ["It is 4<|im_end|>"]


def test_a_conversation_without_an_answer_is_refused(model: Path) -> None:
    with pytest.raises(DataError, match="no assistant message"):
        conversations(model).encode(TALK[:2])


def test_a_pair_is_a_group_of_the_better_and_the_worse_answer(model: Path) -> None:
    worse = [*TALK[:2], {"role": "assistant", "content": "3"}]
    given = conversations(model, "dpo")
    better, bad = given.samples(Row("7", TALK[:3], worse), "run", "g00000007", 3)
    assert (better.reward, bad.reward, better.member, bad.member) == (1.0, 0.0, 0, 1)
    assert trained_text(model, bad.trajectory.tokens, bad.trajectory.loss_mask) == ["3<|im_end|>"]
    assert better.group == bad.group == "g00000007" and better.trajectory.oldest_version == 3
    with pytest.raises(DataError, match="'rejected' must be the worse conversation"):
        given.samples(Row("7", TALK[:3], "3"), "run", "g00000007", 3)
