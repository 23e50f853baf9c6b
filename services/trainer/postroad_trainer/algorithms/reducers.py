"""How per-token losses become one number: the weight of a token in the sum."""

from __future__ import annotations

from collections.abc import Sequence

from postroad_trainer.batch import Reducer


def token_weights(trained_tokens: Sequence[int], reducer: Reducer, constant_length: int | None = None) -> list[float]:
    """The weight of each trained token of each row, such that loss = sum over rows and tokens of weight x token loss.

    token: 1 / all trained tokens of the batch (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8);
    sample: 1 / (rows x trained tokens of the row) (GRPO, Shao et al. 2024, arXiv:2402.03300, eq. 3);
    constant: 1 / (rows x constant_length) (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783).
    Rows count here even when they are not run because their advantage is 0.
    """
    if not trained_tokens or min(trained_tokens) < 1:
        raise ValueError("every row needs at least one trained token before the loss can be reduced")
    rows = len(trained_tokens)
    if reducer == "token":
        return [1.0 / sum(trained_tokens)] * rows
    if reducer == "sample":
        return [1.0 / (rows * count) for count in trained_tokens]
    if constant_length is None or constant_length < 1:
        raise ValueError("the constant reducer needs constant_length, a number of tokens of at least 1")
    return [1.0 / (rows * constant_length)] * rows
