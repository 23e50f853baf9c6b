"""Each grader as a table, and the registry's errors."""

from __future__ import annotations

import inspect

import pytest
from grader_parts import grade

from postroad_reward.errors import GraderSettingsError, InvalidReward, UnknownGrader
from postroad_reward.graders import GRADERS, Grade, check


@pytest.mark.parametrize(
    ("response", "label", "reward"),
    [
        (r"\boxed{1/2}", "0.5", 1), (r"\boxed{0.25}", "1/4", 1), (r"so it is $\boxed{1,000}$", 1000, 1),
        (r"\boxed{2x+1}", "1+2x", 1), (r"\boxed{x^{2}}", "x^2", 1), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (r"\boxed{2/4}", "1/2", 1), ("The answer is 42.", 42, 1), ("The answer is 41.", 42, 0),
        (r"\boxed{0}", 0, 1), (r"$\frac{3}{4}$", r"\boxed{\frac{3}{4}}", 1), (r"$x = 5$", "5", 1),
        ("I do not know", "7", 0), ("", "7", 0), (r"\boxed{\frac{1}{", "7", 0), (r"\boxed{[1,2)}", "(1,2)", 0),
        (r"$1 \le x$ and $\{}}{$", "7", 0), ("1/0", "7", 0), ("\x00\ud7ff", "7", 0),
    ],
)  # fmt: skip
def test_math(response, label, reward):
    assert grade("math", response, label).reward == reward


@pytest.mark.parametrize("label", [None, "", "  "])
def test_math_without_a_readable_label_is_a_failure_not_a_zero(label):
    with pytest.raises(ValueError, match="can't be read as mathematics"):
        grade("math", "4", label)


@pytest.mark.parametrize(
    ("response", "label", "settings", "reward"),
    [
        (" yes\n", "yes", {}, 1), ("Yes", "yes", {}, 0), ("Yes", "yes", {"ignore_case": True}, 1),
        ("a  b", "a b", {}, 1), ("a  b", "a b", {"ignore_white_space": False}, 0),
        ("yes!", "yes", {"ignore_punctuation": True}, 1), ("The cat", "a cat", {"ignore_articles": True, "ignore_case": True}, 1),
        ("4", 4, {}, 1), ("B", ["A", "B"], {}, 1), ("C", ["A", "B"], {}, 0),
        ("no: 3, then: 4", "4", {"pattern": r"\d+"}, 1), ("Answer: B because", "B", {"pattern": r"Answer:\s*(\w)"}, 1),
        ("none", "4", {"pattern": r"\d+"}, 0),
    ],
)  # fmt: skip
def test_exact(response, label, settings, reward):
    assert grade("exact", response, label, settings).reward == reward


def test_exact_without_a_label_is_a_failure():
    with pytest.raises(ValueError, match="label_key"):
        grade("exact", "4")


@pytest.mark.parametrize(
    ("response", "label", "unit", "reward", "exact"),
    [
        ("1234", "1234", "character", 1, 1), ("1 2 3 4", "1234", "character", 1, 1), ("1243", "1234", "character", 0.5, 0),
        ("", "1234", "character", 0, 0), ("12345", "1234", "character", 1, 0), ("12", 1234, "character", 0.5, 0),
        ("the cat sat", "the dog sat", "word", 2 / 3, 0),
    ],
)  # fmt: skip
def test_positions(response, label, unit, reward, exact):
    result = grade("positions", response, label, {"unit": unit})
    assert (result.reward, result.metrics["exact"]) == (pytest.approx(reward), exact)


def test_positions_without_a_label_is_a_failure():
    with pytest.raises(ValueError, match="label"):
        grade("positions", "1", " ")


PRODUCT = {
    "task": "products", "settings": {"min_terms": 2, "max_terms": 2}, "seed": 1, "size": 5,
    "entry": {"question": "3 * 4", "answer": "12", "metadata": {"source_dataset": "products"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("response", "settings", "reward"),
    [
        ("3 * 4 = 12", {"answer": "last_number"}, 1), ("12 or 13", {"answer": "last_number"}, 0),
        ("none", {"answer": "last_number"}, 0), (" 12\n", {"answer": "all"}, 1), ("it is 12", {"answer": "all"}, 0),
        ("it is 12", {"answer": "all", "binary": False}, 2 / 8), ("<answer> 12 </answer>", {}, 1), ("12", {}, 0),
        ("<answer>1</answer><answer>12</answer>", {"answer": "tag"}, 1), ("-12", {"answer": "last_number"}, 0),
    ],
)  # fmt: skip
def test_reasoning_gym(response, settings, reward):
    assert grade("reasoning_gym", response, None, settings, PRODUCT).reward == pytest.approx(reward)


def test_reasoning_gym_without_an_entry_is_a_failure():
    with pytest.raises(ValueError, match=r"metadata\.entry"):
        grade("reasoning_gym", "<answer>1</answer>")


def test_function(monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))

    def call(name, response="4"):
        return grade("function", response, "4", {"path": f"example_rewards.{name}"}, {"bonus": 2})

    assert call("length", "four").reward == 4
    assert call("everything") == Grade(1.0, {"turns": 1.0, "bonus": 2.0})
    assert call("by_keywords").reward == 4
    for name in ("not_a_number", "a_word"):
        with pytest.raises(InvalidReward, match="finite number"):
            call(name)
    with pytest.raises(LookupError, match="no rule"):
        call("raises")
    with pytest.raises(GraderSettingsError, match="is a int, not a function"):
        call("NOT_A_FUNCTION")
    with pytest.raises(GraderSettingsError, match=r"there is no function example_rewards\.missing"):
        call("missing")


@pytest.mark.parametrize(
    ("name", "settings", "error", "text"),
    [
        ("maths", {}, UnknownGrader, "there is no grader 'maths': did you mean 'math'"),
        ("zzz", {}, UnknownGrader, "known: code, combination, dapo"),
        ("exact", {"ignorecase": True}, GraderSettingsError, "no setting 'ignorecase': did you mean 'ignore_case'"),
        ("exact", {"pattern": "("}, GraderSettingsError, "not a regular expression"),
        ("reasoning_gym", {"answer": "first"}, GraderSettingsError, r"'answer' .* \(got 'first'\)"),
        ("function", {}, GraderSettingsError, "'path' .*required"),
        ("function", {"path": "nodots"}, GraderSettingsError, "got 'nodots'"),
    ],
)  # fmt: skip
def test_bad_grader_or_settings_are_explained(name, settings, error, text):
    with pytest.raises(error, match=text):
        check(name, settings)


def test_every_grader_says_where_it_comes_from():
    for grader in GRADERS.values():
        function = grader.run or grader.grade
        told = f"{inspect.getmodule(function).__doc__} {function.__doc__}"
        assert f"`{grader.name}`" in told and len(told) > 120, grader.name
