"""What can be wrong with the numbers that an algorithm is given. Every one is a ValueError that names value and remedy."""

from __future__ import annotations


class AlgorithmError(ValueError):
    """An algorithm was given numbers or settings for which it is not defined."""


class NotFiniteError(AlgorithmError):
    """A number that takes part in the step is NaN or infinite."""


class NothingTrainedError(AlgorithmError):
    """No token is left to train where the formula needs at least one."""


class MissingScoreError(AlgorithmError):
    """An algorithm asked for log-probabilities or values that were not computed."""


class ExecutionRewardsError(AlgorithmError):
    """Samples that come from one execution carry different rewards."""
