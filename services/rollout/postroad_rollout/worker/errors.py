"""What can go wrong between a worker and the model."""

from __future__ import annotations


class RouterFailure(Exception):
    """The router could not be reached or answered nothing usable: ask again. `reason` is counted."""

    def __init__(self, reason: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.retry_after_s = reason, retry_after_s


class RefusedByEngine(Exception):
    """The model does not take this prompt, such as one that is too long: asking again is useless."""


class SessionLost(Exception):
    """The router does not know the session any more: what was generated is gone, the member has to begin anew."""


class ToolLost(Exception):
    """A tool could not be reached, or the process that held the attempt's state is gone: the member begins anew."""


class PeerFailed(Exception):
    """Another member of the group, whose trajectory this one goes on from, failed."""


class DeadlinePassed(Exception):
    """The member was not done when the task's deadline passed."""


class AgentSettingsError(ValueError):
    """There is no agent of this kind, or not with these settings."""
