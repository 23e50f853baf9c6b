"""`f1`: the F1 of the answer's words and the label's (the best of a list of labels), normalised as SQuAD's script does
(Rajpurkar et al. 2016). Where one of the two is yes, no or noanswer and they differ it is 0 (HotpotQA, Yang et al. 2018).
"""

from __future__ import annotations

from collections import Counter

from postroad_reward.graders.answers import AnswerSettings, labels_of
from postroad_reward.graders.base import Attempt, Grade, Grader
from postroad_reward.graders.exact import ExactSettings, normalise

_SQUAD = ExactSettings(
    pattern=None, boxed=False, ignore_case=True, ignore_punctuation=True, ignore_articles=True, ignore_white_space=True
)
_CLOSED = {"yes", "no", "noanswer"}


def grade(attempt: Attempt, settings: AnswerSettings) -> Grade:
    labels = [normalise(label, _SQUAD) for label in labels_of(attempt.label, "f1")]
    answer = settings.answer(attempt.response)
    if answer is None:
        return Grade(0.0, {"exact": 0.0})
    text = normalise(answer, _SQUAD)
    return Grade(max(f1(text, label) for label in labels), {"exact": float(text in labels)})


def f1(answer: str, label: str) -> float:
    if answer != label and {answer, label} & _CLOSED:
        return 0.0
    mine, theirs = answer.split(), label.split()
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else float(mine == theirs)


GRADER = Grader("f1", AnswerSettings, grade)
