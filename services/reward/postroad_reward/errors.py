"""What can go wrong in a grading. None of it is ever a reward of 0."""

from __future__ import annotations


class UnknownGrader(ValueError):
    """No grader has this name; the message has the nearest one."""


class GraderSettingsError(ValueError):
    """A grader refuses its settings; the message has a line per fault."""


class InvalidReward(ValueError):
    """A grader returned something that is no finite number."""


class RemoteTraceback(Exception):
    """The traceback of an exception in a grader's process, as text: the cause of what is raised here for it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"in the grader's process:\n{self.text}"


class GraderFailed(Exception):
    """The grader raised, returned no number, or its process died. `settings` is true where no retry can help."""

    def __init__(self, message: str, *, settings: bool = False) -> None:
        super().__init__(message)
        self.settings = settings


class GraderTimeout(Exception):
    """The grading ran past its deadline; its process was killed."""


class JudgeUnavailable(Exception):
    """A judge or a remote grader could not be reached, or failed, more often than is tried."""


class InvalidAnswer(Exception):
    """A judge or a remote grader answered what can't be read as a score."""
