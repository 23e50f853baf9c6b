"""Junctions of every family, to the token: what a session puts together is what the template renders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from postroad_router.conversation import Asked
from postroad_router.families import FAMILIES
from postroad_router.sessions.drift import find_drift
from postroad_router.sessions.junction import Junctions
from postroad_router.template import ChatTemplate, Vocabulary
from postroad_router.template_check import CONVERSATIONS, TOOLS, USER, check

FOLDER = Path(__file__).parent / "templates"
CASES = {
    "qwen3": "qwen3", "qwennext": "qwen3", "qwen35": "qwen35", "nemotron3": "qwen35", "glm47": "glm47", "kimi25": "kimi",
    "kimi26": "kimi", "deepseekv32": "deepseekv32", "deepseekv4": "deepseekv32", "deepseekv3": "deepseekv32",
    "gpt-oss": "gpt-oss", "minimax": "minimax", "llama": "llama", "default": "llama",
}  # fmt: skip
THOUGHTS_GO = {"several users, thinking on", "user after tool, thinking on", "system in the middle, thinking on"}
REWRITTEN = {"gpt-oss": THOUGHTS_GO, "deepseekv3": THOUGHTS_GO}  # there is no variable that keeps them


def junctions(family: str, template: str = "", **variables: Any) -> Junctions:
    text = (FOLDER / f"{template or CASES[family]}.jinja").read_text()
    special = sorted(set(re.findall(r"<[|｜][^<>\s'+]+[|｜]>|\]~b\]|\[e~\[", text)) | {"<|return|>", "<|observation|>"})
    characters = [chr(code) for code in range(10, 127)]
    ids = {token: number for number, token in enumerate([*special, *characters, "｜"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return Junctions(ChatTemplate(text, {}), Vocabulary(tokenizer), FAMILIES[family])


def test_every_family_has_a_template() -> None:
    assert CASES.keys() == FAMILIES.keys() and set(CASES.values()) == {path.stem for path in FOLDER.iterdir()}


@pytest.mark.parametrize("family", CASES)
def test_the_matrix(family: str) -> None:
    outcomes = list(check(junctions(family), FAMILIES[family].reopens))
    assert len(outcomes) == 2 * len(CONVERSATIONS)
    assert {o.case for o in outcomes if o.kind == "rewrites"} == REWRITTEN.get(family, set())
    refused = {o.case for o in outcomes if o.kind == "refused"}
    assert refused == (
        {"parallel tools, thinking on", "parallel tools, thinking off"} if CASES[family] == "llama" else set()
    )
    assert all(o.kind in ("appends", "rewrites", "refused") for o in outcomes), outcomes


@pytest.mark.parametrize("family", CASES)
def test_a_tool_turn_to_the_token(family: str) -> None:
    """The model ends its turn with its end token; prefix, junction and all are the template's own tokens."""
    parts, messages = junctions(family), CONVERSATIONS["one tool"]
    vocabulary, asked = parts.vocabulary, Asked(messages[:4], TOOLS, {"enable_thinking": False, "thinking": False})
    whole = vocabulary.encode(parts.render(messages[:3], TOOLS, asked.variables, prompt=False))
    while whole and whole[-1] not in vocabulary.special and not vocabulary.decode(whole[-1:]).strip():
        whole.pop()
    reopens = FAMILIES[family].reopens if family == "glm47" else ()
    tokens = whole + vocabulary.encode("<|observation|>" if reopens else "")
    end = vocabulary.special.get(tokens[-1], "")
    junction = parts.after(messages[2], False, end, messages[3:4], asked)
    assert junction is not None and junction.drop == len(reopens[:1])
    joined = tokens[: len(tokens) - junction.drop] + vocabulary.encode(junction.text)
    assert joined == vocabulary.encode(parts.render(asked.messages, TOOLS, asked.variables))


def test_an_answer_without_its_end_is_closed() -> None:
    asked = Asked([USER, {"role": "assistant", "content": "cut"}, USER], None, {})
    for family, closing in (("qwen3", "<|im_end|>\n<|im_start|>user"), ("minimax", "[e~[\n]~b]user"), ("glm47", "<|user|>"),
                            ("gpt-oss", "<|end|><|start|>user"), ("kimi26", "<|im_end|><|im_user|>")):  # fmt: skip
        junction = junctions(family).after(asked.messages[1], False, "", [USER], asked)
        assert junction is not None and junction.text.startswith(closing), family
    returned = junctions("gpt-oss").after(asked.messages[1], False, "<|return|>", [USER], asked)
    assert returned is not None and returned.drop == 1 and returned.text.startswith("<|end|><|start|>user")


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>", []),
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nYes", ["assistant_text"]),
        ("<|im_start|>user\nho<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n", ["non_assistant_text"]),
        ("<|im_end|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n", ["special_token_type"]),
        ("<|im_start|>user\nhi\n<|im_start|>assistant\nyes<|im_end|>\n", ["special_token_count"]),
    ],
)
def test_drift_is_classified(said: str, kinds: list[str]) -> None:
    vocabulary = junctions("qwen3").vocabulary
    tokens = np.array(vocabulary.encode(said), np.int32)
    generated = np.zeros(len(tokens), np.uint8)
    generated[len(vocabulary.encode(said[: said.index("assistant\n") + 10])) :] = 1
    canonical = vocabulary.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
    found = find_drift(tokens, generated, canonical, vocabulary)
    assert [drift.kind for drift in found] == kinds
    assert all(drift.expected != drift.actual for drift in found)


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "postroad_router.template_check", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    good = run(str(FOLDER / "qwen3.jinja"), "--family", "qwen3")
    assert good.returncode == 0 and good.stdout.count("appends") == 12
    stock = run(str(FOLDER / "qwen3.jinja"))
    assert stock.returncode == 1 and "rewrites several users, thinking on, at message" in stock.stdout
    assert "first divergence" in stock.stdout and "<think>" in stock.stdout
    for text in (None, "{% if"):
        path = tmp_path / "bad.jinja"
        if text is not None:
            path.write_text(text)
        bad = run(str(path))
        assert (bad.returncode == 2 and "bad.jinja" in bad.stderr) or "not valid Jinja" in bad.stderr
