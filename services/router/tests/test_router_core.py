"""The pure parts: text from tokens, the chat template, the pool, the facts of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from postroad_router.generation import version_spans
from postroad_router.model import ModelFolderError, read_model
from postroad_router.pool import QUARANTINE_MAX_S, Engine, Pool, quarantine_s
from postroad_router.routing import Routing, Wanted
from postroad_router.template import ChatTemplate, TemplateError, Vocabulary, load_template, load_vocabulary
from postroad_router.text import TextStream


def byte_vocabulary() -> Vocabulary:
    """Every byte is a token, so that characters are split in all ways."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Vocabulary(tokenizer)


VOCABULARY = byte_vocabulary()


@given(st.text(max_size=30), st.data())
def test_text_comes_whole_whatever_the_cut(text: str, data: Any) -> None:
    tokens = VOCABULARY.encode(text)
    stream, parts = TextStream(VOCABULARY.decode), []
    while tokens:
        size = data.draw(st.integers(1, len(tokens)))
        parts.append(stream.push(tokens[:size]))
        tokens = tokens[size:]
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    assert "".join([*parts, stream.close()]) == text
    assert b"".join(VOCABULARY.token_bytes(token) for token in VOCABULARY.encode(text)) == text.encode()


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], size: int) -> None:
    tokens = VOCABULARY.encode(text)
    stream = TextStream(VOCABULARY.decode, stops)
    parts = [stream.push(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    got = "".join([*parts, stream.close()])
    end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    assert (
        (stream.matched is not None) == (end is not None)
        and text.startswith(got)
        and not any(stop in got for stop in stops)
    )
    if size == 1:  # an engine looks after each token, so that the stop string which is complete first ends it
        cut = min((text[:end].find(stop) for stop in stops if stop in text[:end]), default=None)
        assert got == (text if end is None else text[:cut])


TEMPLATE = (
    "{%- for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no role x') }}{% endif %}"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    "{{ tools | tojson }}{{ eos_token }}{{ flag }}"
)


def test_a_template_renders_as_hugging_faces_does() -> None:
    template = ChatTemplate(TEMPLATE, {"eos_token": "<e>"})
    messages = [{"role": "user", "content": f" {name} "} for name in "äbc"]
    text = template.render(messages, tools=[{"name": "<é>"}], variables={"flag": 1, "messages": []})
    assert text == 'äb[{"name": "<é>"}]<e>1'


@pytest.mark.parametrize(
    ("text", "messages"),
    [(TEMPLATE, [{"role": "x", "content": ""}]), ("{{ messages[0].a.b }}", [{"role": "user"}]),
     ("{{ messages.__class__.__mro__ }}", []), ("{{ messages.append(1) }}", []), ("{{ 1 + 'a' }}", [])],
)  # fmt: skip
def test_a_template_can_refuse_and_can_do_no_harm(text: str, messages: list[Any]) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(text, {}).render(messages)


def test_model_folders_that_lack_something(tmp_path: Path) -> None:
    for load in (read_model, load_vocabulary, load_template):
        with pytest.raises(ModelFolderError, match=str(tmp_path)):
            load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFolderError):
        load_vocabulary(tmp_path)
    with pytest.raises(ModelFolderError):
        load_template(tmp_path, "{% for %}")


def test_facts_of_a_model(tmp_path: Path) -> None:
    config = {"vocab_size": 9, "eos_token_id": 1, "n_routed_experts": 300, "num_experts_per_tok": 4,
              "num_hidden_layers": 4, "first_k_dense_replace": 1}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    facts = read_model(tmp_path)
    assert (facts.vocabulary, facts.end_ids, facts.experts, facts.experts_per_token) == (9, {1, 2}, 300, 4)
    assert facts.moe_layers == (1, 2, 3)


def member(**info: Any) -> dict[str, Any]:
    return {"url": "http://e", "pid": 1, "version": 1, "state": "ready", "slots": 4, **info}


def chosen(pool: Pool, **wanted: Any) -> Engine | None:
    route = Routing().choose(pool.engines.values(), Wanted(**wanted))
    return None if route is None else route.engine


def test_the_pool_chooses_by_load_version_and_state() -> None:
    pool = Pool()
    assert pool.update({"a": member(), "b": member(version=2), "c": member(state="pulling")})
    assert not pool.update({"a": member(running=3), "b": member(version=2), "c": member(state="pulling")})
    a, b = pool.engines["a"], pool.engines["b"]
    pool.start(a, 100)
    assert chosen(pool) is b and chosen(pool, avoid=frozenset("b")) is a and chosen(pool, minimum_version=2) is b
    assert chosen(pool, minimum_version=3) is None and chosen(pool, minimum_version=2, avoid=frozenset("b")) is b
    assert chosen(pool, version=1) is a
    pool.end(a, 100)
    assert (a.requests, a.tokens) == (0, 0)


def test_quarantine_grows_and_ends() -> None:
    pool = Pool()
    pool.update({"a": member()})
    a = pool.engines["a"]
    pool.fail(a, 10.0)
    pool.fail(a, 10.1)
    assert a.failures == 1 and chosen(pool) is None and pool.due_probes(10.4) == [] and pool.due_probes(10.5) == [a]
    pool.probed(a, False, 10.5)
    assert a.quarantined_until == 11.5
    pool.probed(a, True, 11.5)
    assert chosen(pool) is a and a.failures == 2
    pool.succeed(a)
    assert a.failures == 0 and quarantine_s(40) == QUARANTINE_MAX_S
    pool.fail(a, 20.0)
    pool.update({"a": member(pid=2)})
    assert chosen(pool) is pool.engines["a"]


def test_spans_of_versions() -> None:
    assert version_spans([1, 1, 2, 1]) == [(0, 2, 1), (2, 3, 2), (3, 4, 1)] and version_spans([]) == []
