"""The rewards of teams, by hand."""

from __future__ import annotations

import pytest

from postroad_reward.errors import GraderSettingsError
from postroad_reward.graders import Attempt, Grade, check, find, parts_of

SETTINGS = {"grader": "exact", "solvers": 1, "rewriters": 2}


class Inner:
    """A context whose graders find what is right."""

    async def grade(self, grader, settings, attempts):
        assert grader == "exact" and not any("Judgment" in attempt.response for attempt in attempts)
        return [Grade(float(attempt.response == "right")) for attempt in attempts]


@pytest.mark.parametrize(
    ("responses", "rewards"),
    [
        (["right", "wrong", "right", "Judgment: 2"], [1.2, 0, 1.2, 1.2]),
        (["right", "wrong", "right", "Judgment: 1"], [0.8, 0, 0.8, 0]),
        (["wrong", "right", "wrong", "<think>Judgment: 2</think> Judgment: 1"], [0, 1.2, 0, 1.2]),
        (["right", "right", "right", "no Judgment"], [0.8, 0.8, 0.8, 0]),
        (["right", "right", "right", "Judgment: 7"], [0.8, 0.8, 0.8, 0]),
        (["right"], [1]),  # an evaluation
        (["right", "right", "right", "Judgment: 1", "wrong", "wrong", "wrong", "Judgment: 1"], [1.2] * 4 + [0] * 4),
    ],
)
async def test_a_selector_earns_what_it_chose(responses, rewards):
    attempts = [Attempt([], response, label="right") for response in responses]
    grades = await find("multi_agent").run(attempts, check("multi_agent", SETTINGS), Inner())
    assert [grade.reward for grade in grades] == pytest.approx(rewards)


def test_settings_reach_the_inner_grader():
    assert list(parts_of("multi_agent", SETTINGS)) == [("exact", {})]
    with pytest.raises(GraderSettingsError, match="no setting 'ignore'"):
        check("multi_agent", {"grader": "exact", "settings": {"ignore": True}})
