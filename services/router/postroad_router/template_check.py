"""`postroad template check`: can conversations under this chat template be continued by appending tokens alone?

Canned conversations are put together turn by turn, as a session does it, and compared with the template's rendering of
the whole. Where the template rewrites what was said before, sessions begin a branch: right, but each branch is a
trajectory of its own.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models

from postroad_router.conversation import Asked, Message
from postroad_router.families import FAMILIES
from postroad_router.model import ModelFolderError, read_model
from postroad_router.sessions.junction import Junctions
from postroad_router.template import ChatTemplate, TemplateError, Vocabulary, load_template

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}},
}}}]  # fmt: skip
SPECIAL_END = re.compile(r"<[|｜][^<>\s]+[|｜]>$")
USER: Message = {"role": "user", "content": "How warm is it?"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
SHOWN = 60


def _says(text: str, *cities: str, first: int = 0) -> Message:
    calls = [
        {
            "id": f"functions.look:{first + n}", "type": "function",
            "function": {"name": "look", "arguments": f'{{"city": "{city}"}}'},
        } for n, city in enumerate(cities)
    ]  # fmt: skip
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})


def _result(number: int) -> Message:
    return {"role": "tool", "tool_call_id": f"functions.look:{number}", "name": "look", "content": f"{number} degrees"}


CONVERSATIONS: dict[str, list[Message]] = {
    "one tool": [SYSTEM, USER, _says("", "Oslo"), _result(0), _says("Cold.")],
    "tool after tool": [USER, _says("Looking.", "Oslo"), _result(0), _says("", "Rome", first=1), _result(1), _says("Warm.")],
    "parallel tools": [USER, _says("", "Oslo", "Rome"), _result(0), _result(1), _says("Both.")],
    "several users": [SYSTEM, USER, _says("Cold."), USER, _says("Still cold."), USER, _says("Yes.")],
    "user after tool": [
        USER, _says("", "Oslo"), _result(0), _says("Cold."), USER, _says("", "Rome", first=1), _result(1), _says("Warm."),
    ],
    "system in the middle": [USER, _says("Cold."), SYSTEM, USER, _says("Yes.")],
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one conversation: `appends`; `rewrites`: at message number `cut` the template changes what was before it;
    `differs`: a junction is not what the template writes; `refused` by the template."""

    case: str
    kind: str
    cut: int = 0
    expected: str = ""
    actual: str = ""


def check(junctions: Junctions, reopens: Sequence[str]) -> Iterator[Outcome]:
    """The outcome of each conversation, with and without thinking."""
    for name, messages in CONVERSATIONS.items():
        tools = TOOLS if "tool" in name else None
        for thinking in (True, False):
            said = [
                {**m, "reasoning_content": "Let me see."} if thinking and m["role"] == "assistant" else m
                for m in messages
            ]
            variables = {"enable_thinking": thinking, "thinking": thinking}
            case = f"{name}, thinking {'on' if thinking else 'off'}"
            try:
                yield _outcome(case, junctions, reopens, Asked(said, tools, variables))
            except TemplateError as error:
                yield Outcome(case, "refused", actual=str(error))


def _outcome(case: str, junctions: Junctions, reopens: Sequence[str], asked: Asked) -> Outcome:
    answers = [number for number, message in enumerate(asked.messages) if message["role"] == "assistant"]
    text = junctions.render(asked.messages[: answers[0]], asked.tools, asked.variables)
    for number, following in itertools.pairwise(answers):
        whole = junctions.render(asked.messages[: number + 1], asked.tools, asked.variables, prompt=False)
        if not whole.startswith(text):
            return Outcome(case, "rewrites", number, *_divergence(whole, text))
        tail, closed = junctions.tail(asked.variables).strip(), whole.rstrip()
        found = SPECIAL_END.search(closed)
        end = tail if tail and closed.endswith(tail) else found[0] if found else ""
        new = asked.messages[number + 1 : following]
        last = reopens[0] if reopens and tail in ("", end) else end
        junction = junctions.after(
            asked.messages[number], "reasoning_content" in asked.messages[number], last, new, asked
        )
        canonical = junctions.render(asked.messages[:following], asked.tools, asked.variables)
        if junction is None:
            return Outcome(case, "rewrites", number, *_divergence(canonical, whole))
        text = closed.removesuffix(end if junction.drop else "") + junction.text
        if text != canonical:
            return Outcome(case, "differs", number, *_divergence(canonical, text))
    return Outcome(case, "appends")


def _divergence(expected: str, actual: str) -> tuple[str, str]:
    place = next(
        (n for n, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), min(len(expected), len(actual))
    )
    start = max(place - SHOWN // 2, 0)
    return expected[start : start + SHOWN], actual[start : start + SHOWN]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="postroad template check", description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="a model's folder, or a file with a chat template")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="whose rules; a model's folder tells it itself")
    given = parser.parse_args(arguments)
    try:
        folder = given.path if given.path.is_dir() else None
        template = ChatTemplate(given.path.read_text(), {}) if folder is None else load_template(folder)
        family = FAMILIES[given.family or ("default" if folder is None else read_model(folder).family)]
    except (OSError, ModelFolderError) as error:
        print(error, file=sys.stderr)
        return 2
    outcomes = list(check(Junctions(template, Vocabulary(Tokenizer(models.BPE())), family), family.reopens))
    print(f"family {family.name}, with {family.variables or 'no variables'}")
    for outcome in outcomes:
        print(f"{outcome.kind:9}{outcome.case}" + (f", at message {outcome.cut}" if outcome.expected else ""))
    worst = next((outcome for outcome in outcomes if outcome.kind in ("differs", "rewrites")), None)
    if worst is not None:
        print(f"\nfirst divergence ({worst.case}):\n  template: {worst.expected!r}\n  appended: {worst.actual!r}")
    return int(worst is not None)


if __name__ == "__main__":
    sys.exit(main())
