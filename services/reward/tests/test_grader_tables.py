"""Graders whose verdicts must be those of a published rule, as tables."""

from __future__ import annotations

import itertools

import pytest
from grader_parts import grade

from postroad_reward.errors import GraderSettingsError
from postroad_reward.graders import Attempt, check
from postroad_reward.graders import math as math_grader


@pytest.mark.parametrize(
    ("answer", "label", "reward"),
    [
        ("10\\%", "10", 1), ("x=5", "5", 1), ("(1,2)", "(1, 2)", 1), ("3.0", "3", 1), (r"3 \text{ cm}", "3", 1),
        (r"\frac{1}{2}", "0.5", 1), (r"\{1,2,3\}", r"\{3,2,1\}", 1), (r"\{1,2\}", r"\{1,3\}", 0), ("(1,2]", "(1,2]", 1),
        ("(1,2]", "(1,2)", 0), (r"(-\infty,3]", r"(-\infty, 3]", 1),
        (r"(-\infty,0)\cup(1,2)", r"(1,2)\cup(-\infty,0)", 1),
        (r"5\text{ meters}", "5", 1), (r"\frac{3}{4}", "0.75", 1), (r"-\frac{1}{3}", r"\frac{-1}{3}", 1),
        ("007", "7", 1),
        ("12", "21", 0), (r"2\pi", r"6", 0), (r"\dfrac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1), ("90^\\circ", "90", 1),
    ],
)  # fmt: skip
def test_math_boxed(answer, label, reward):
    assert grade("math", rf"So it is $\boxed{{{answer}}}$.", label).reward == reward


def test_the_fast_ways_of_math_agree_with_math_verify():
    contents = [
        "5", "-5", "05", "1,000", r"\frac{1}{2}", "0.5", "x=5", r"\{1,2\}", "10\\%", "2\\pi", "A", "1,2", "(2,1)",
        "2x+1", r"7 3/4",
    ]  # fmt: skip
    frames = [
        r"\boxed{%s}", r"so $\boxed{%s}$.", "\n\\[\\boxed{%s}\\]", r"with $x=3$ it is \boxed{%s}.", r"$-\boxed{%s}$",
        r"final answer is $\boxed{%s}$. I hope it is correct.", r"\boxed{3} or \boxed{%s}", r"$x = \boxed{%s}$", r"2 \boxed{%s}",
    ]  # fmt: skip
    settings, fast = math_grader.MathSettings(), 0
    for frame, content, label in itertools.product(frames, contents, ["5", "0.5", "(1,2)"]):
        response = frame % content
        fast += math_grader.box_alone(response) is not None
        fresh = math_grader.verdict(label, response, settings)
        assert math_grader.grade(Attempt([], response, label), settings) == fresh, (response, label)
    assert fast > 100


@pytest.mark.parametrize(
    ("answer", "label", "reward"),
    [
        ("1/2", "0.5", 1), ("0.5", r"\frac{1}{2}", 1), ("1,000", "1000", 1), ("10\\%", "10", 1), ("x=5", "5", 1),
        ("2/4", "1/2", 0),
        ("(1,2)", "(1, 2)", 1), ("[1,2)", "(1,2)", 0), ("2x+1", "1+2x", 1), ("x^{2}", "x^2", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        ("7 3/4", "31/4", 1), ("3.0", "3", 1), (r"\text{Yes}", "yes", 1), (r"3 \text{ cm}", "3", 1),
        (r"\frac{1}{2}", r"\dfrac12", 1),
        ("5", "6", 0), ("5", r"\boxed{5}", 1), ("", "5", 0), ("9**9**9", "5", 0), ("__import__('os')", "5", 0),
        ("(1,\\frac{1}{2})", "(1,1/2)", 1), ("1,2", "2,1", 0),
    ],
)  # fmt: skip
def test_deepscaler(answer, label, reward):
    assert grade("deepscaler", rf"<think>hm \boxed{{77}}</think> \boxed{{{answer}}}", label).reward == reward


def test_deepscaler_wants_the_answer_after_the_thinking():
    assert grade("deepscaler", r"\boxed{5}", "5").reward == 0
    assert grade("deepscaler", r"\boxed{5}", "5", {"thinking": False}).reward == 1
    assert grade("deepscaler", r"###Response \boxed{5}", 5).reward == 1
    assert grade("deepscaler", r"</think> \boxed{5", "5").reward == 0
    with pytest.raises(ValueError, match="empty"):
        grade("deepscaler", r"</think> \boxed{5}", "")


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        ("Answer: 42", "42", 1), ("answer : $42$", 42, 1), (r"Answer: \boxed{42}", "42", 1),
        ("Answer: 42 degrees", "42", 1),
        ("Answer: 1,234", "1234", 1), ("Answer: x = 7", "7", 1), (r"\boxed{42}", "42", -1), ("Answer: 3.0", "3", -1),
        ("Answer: 42\nAnswer: 41", "42", -1), ("Answer: 3", "3.0", 1), ("Answer: 3", "3.7", -1),
        ("Answer: 42" + " " * 300, "42", -1),
        (r"Answer: \frac12", r"\frac{1}{2}", 1), ("", "1", -1),
    ],
)  # fmt: skip
def test_dapo(response, label, reward):
    result = grade("dapo", response, label)
    assert (result.reward, result.metrics["accuracy"]) == (reward, float(reward > 0))


def test_dapo_strict():
    assert grade("dapo", r"so \boxed{42}", "42", {"boxed": True}).reward == 1
    assert grade("dapo", r"\boxed{42}" + "x" * 100, "42", {"boxed": True}).reward == -1


@pytest.mark.parametrize(
    ("response", "label", "metadata", "reward"),
    [
        ("The answer is B", "B", {}, 1), ("I choose (D)", "D", {}, 1), ("The final answer is: **C**", "C", {}, 1),
        ("no idea", "A", {}, 0), ("answer is Because of C", "C", {}, 1), ("answer is because I say so", "B", {}, 0),
        ("A dog came by", "A", {}, 0), ("I think so", "I", {}, 0), ("The answer is a mystery", "A", {}, 0),
        ("it is paris", "Paris", {"choices": ["Rome", "Paris"]}, 1),
        ("rome or paris", "Paris", {"choices": ["Rome", "Paris"]}, 0),
        ("B", "Paris", {"choices": ["Rome", "Paris"]}, 1), ("The answer is A", 1, {"choices": ["Rome", "Paris"]}, 0),
        ("Answer: (b)", 1, {"choices": ["Rome", "Paris"]}, 1), ("E", "E", {"choices": ["Rome", "Paris"]}, 0),
        ("<think>the answer is A</think> The answer is B.", "B", {}, 1),
        ("Option A is wrong. The answer is B", "B", {}, 1),
        (r"The answer is \boxed{C}", "C", {}, 1), ("B is correct", "B", {}, 1),
        ("The answer is D", None, {"correct_letter": "D"}, 1),
        ("42", None, {"correct_answer": 42}, 1), ("1", "1", {"choices": ["0", "1"]}, 1), ("", "A", {}, 0),
        ("Vitamin C helps; the answer is A", "A", {}, 1), ("Answer: A and not B", "A", {}, 1),
        ("The answer is A because", "A", {}, 1),
    ],
)  # fmt: skip
def test_multiple_choice(response, label, metadata, reward):
    assert grade("multiple_choice", response, label, metadata=metadata).reward == reward


def test_multiple_choice_without_a_right_choice_is_a_failure():
    with pytest.raises(ValueError, match="no letter, index or text"):
        grade("multiple_choice", "A")


@pytest.mark.parametrize(
    ("response", "label", "reward", "settings"),
    [
        ("the cat sat", "a cat", 2 / 3, {}), ("yes", "no", 0, {}), ("Yes.", "yes", 1, {}), ("x", "y", 0, {}),
        ("", "", 1, {}),
        ("It is blue", ["red", "blue"], 0.5, {}), (r"so \boxed{the cat}", "cat", 1, {"boxed": True}),
        ("cat", "cat", 0, {"boxed": True}),
        ("yes it is", "yes", 0, {}), ("a b b", "b b c", 0.8, {}),
    ],
)  # fmt: skip
def test_f1(response, label, reward, settings):
    assert grade("f1", response, label, settings).reward == pytest.approx(reward)


def test_exact_as_search_r1_has_it():
    squad = {
        "pattern": "(?s)<answer>(.*?)</answer>",
        "ignore_case": True,
        "ignore_punctuation": True,
        "ignore_articles": True,
    }
    assert grade("exact", "<answer>no</answer> <answer> The Cat! </answer>", ["dog", "cat"], squad).reward == 1


LINES = "Hello there. It is me!\n* one\n* two"


@pytest.mark.parametrize(
    ("name", "keywords", "good", "bad"),
    [
        ("keywords:existence", {"keywords": ["cat", "dog"]}, "A cat, a Dog", "A cat"),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a Cat"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a A", "a"),
        ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "less than"}, "e", "ee"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", "a b"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One.", "One. Two."),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
        ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
         "a\n\nso, it is", "so\n\nnot"),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\nP.S. y", "x"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, LINES, "* one"),
        ("detectable_format:constrained_response", {}, "My answer is no.", "My answer is: no"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
        ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
         "SECTION 1 a SECTION 2 b", "SECTION"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<title>>\nx", "<<>>"),
        ("combination:two_responses", {}, "a\n******\nb", "a******a"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say"}, "say it", "no"),
        ("startend:end_checker", {"end_phrase": "The end."}, 'x "the end."', "x"),
        ("startend:quotation", {}, '"x"', '"x'),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BC d", "A b"),
        ("change_case:english_capital", {}, "ABC 1", "Abc"), ("change_case:english_lowercase", {}, "abc", "Abc"),
        ("punctuation:no_comma", {}, "a; b", "a, b"),
    ],
)  # fmt: skip
def test_instructions(name, keywords, good, bad):
    for response, reward in ((good, 1), (bad, 0), ("", 0)):
        metadata = {"instruction_id_list": [name], "kwargs": [{**keywords, "unused": None}]}
        assert grade("instructions", response, metadata=metadata).reward == reward


def test_instructions_all_or_a_share_and_unknown_ones():
    metadata = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": {}}
    assert grade("instructions", "a b", metadata=metadata).reward == 0
    assert grade("instructions", "a b", settings={"partial": True}, metadata=metadata).reward == 0.5
    with pytest.raises(ValueError, match="did you mean 'punctuation:no_comma'"):
        grade("instructions", "a", metadata={"instruction_id_list": ["punctuation:nocomma"]})
    with pytest.raises(ValueError, match="can't be checked with"):
        grade("instructions", "a", metadata={"instruction_id_list": ["keywords:existence"]})
    with pytest.raises(ValueError, match=r"metadata\.instruction_id_list"):
        grade("instructions", "a")


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0), (80, 0), (90, -0.5), (100, -1), (500, -1), (85, -0.25)])
def test_length(tokens, reward):
    assert grade(
        "length", "x", settings={"max_tokens": 100, "cache_tokens": 20}, tokens=tokens
    ).reward == pytest.approx(reward)


def test_format():
    good = "<think>\na\n</think>\n<answer>b</answer>\n"
    assert [grade("format", text).reward for text in (good, "x" + good, "<answer>b</answer>")] == [1, 0, 0]
    assert grade("format", "ab", settings={"pattern": "a."}).reward == 1


def test_json_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    table = [
        ('{"a": 1}', 1),
        ('```json\n{"a": 1}\n```', 1),
        ('{"a": "x"}', 0),
        ("{}", 0),
        ("prose", 0),
        ("[" * 100_000, 0),
    ]
    assert [grade("json_schema", text, settings={"schema": schema}).reward for text, _ in table] == [
        one for _, one in table
    ]
    assert grade("json_schema", '{"a": 1}', metadata={"schema": schema}).reward == 1
    with pytest.raises(ValueError, match="needs its setting schema"):
        grade("json_schema", "{}")


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("length", {"max_tokens": 1, "cache_tokens": 2}, "must not exceed"),
        ("format", {"pattern": "("}, "not a regular expression"),
        ("judge", {"url": "ftp://x", "model": "m"}, "'url'"),
        ("judge", {"url": "http://x", "model": "m", "rubric": "{x}"}, "not a template"),
        ("judge", {"url": "http://x", "model": "m", "lowest": 2, "highest": 1}, "below highest"),
        ("combination", {"parts": []}, "'parts'"),
        ("combination", {"parts": [{"grader": "maths"}]}, "did you mean 'math'"),
        ("combination", {"parts": [{"grader": "math"}, {"grader": "math"}]}, "give them names"),
        ("code", {"partially": 1}, "'partial'"),
    ],
)  # fmt: skip
def test_settings_are_refused_in_a_sentence(name, settings, text):
    with pytest.raises(GraderSettingsError, match=text):
        check(name, settings)
