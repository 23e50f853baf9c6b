"""What the trainer service hands to a backend and what it gets back. Plain data: no torch, no megatron."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from postroad.config.algorithm import AlgorithmSection


class RowError(ValueError):
    """A row that can't be trained; the message names the sample, the value and the remedy."""


@dataclass(frozen=True, eq=False)
class TrainRow:
    """One sample, ready for the optimizer step. T is its length, L its MoE layers, k the experts of a token.

    tokens: int32 [T], prompt first. loss_mask: uint8 [T], 1 where the token is trained.
    logprobs: float32 [T], the engine's log-probability of the token, 0 where the mask is 0.
    advantage: of every trained token, or float32 [T].
    scores: the trainer's, reference's and teacher's log-probabilities by role, float32 [T] as logprobs.
    execution: rows of one attempt have the same name; "": a row is an attempt.
    routed_experts: uint8 or uint16 [T-1, L, k]; row t holds the experts used when token t is the input.
    """

    sample_id: str
    group: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    advantage: float | np.ndarray
    routed_experts: np.ndarray | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    execution: str = ""

    @property
    def trained(self) -> np.ndarray:
        """bool [T]: the tokens that are trained."""
        return self.loss_mask.astype(bool)

    def validate(self, vocab_size: int, max_length: int) -> None:
        """Raises RowError unless the row can be trained by a model of vocab_size ids and rows of max_length tokens."""
        self._validate_tokens(vocab_size, max_length)
        self._validate_training()
        if self.routed_experts is not None:
            self._validate_experts(self.routed_experts)

    def _fail(self, sentence: str) -> None:
        raise RowError(f"sample {self.sample_id!r}: {sentence}")

    def _validate_tokens(self, vocab_size: int, max_length: int) -> None:
        length = len(self.tokens)
        if self.tokens.ndim != 1 or length < 2:
            self._fail(f"tokens has shape {self.tokens.shape}; a row needs at least a prompt token and a trained one")
        if length > max_length:
            self._fail(
                f"{length} tokens are more than the {max_length} a micro-batch may hold; shorten the response "
                "or raise micro_batch_tokens"
            )
        if self.loss_mask.shape != self.tokens.shape or self.logprobs.shape != self.tokens.shape:
            self._fail(
                f"tokens {self.tokens.shape}, loss_mask {self.loss_mask.shape} and logprobs "
                f"{self.logprobs.shape} must have one shape"
            )
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if low < 0 or high >= vocab_size:
            self._fail(
                f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}; the rollout "
                "used another tokenizer or model"
            )

    def _validate_training(self) -> None:
        if not self.loss_mask.any():
            return  # it is not run; its reward counts in the mean of its group
        if int(self.loss_mask.max()) > 1:
            self._fail(f"the loss mask holds {int(self.loss_mask.max())}; only 0 and 1 have a meaning")
        if self.loss_mask[0]:
            self._fail("token 0 is trained, but nothing comes before it to predict it from; mask it")
        advantages = np.broadcast_to(self.advantage, self.tokens.shape)[self.trained]
        if not np.isfinite(advantages).all():
            self._fail(f"an advantage is {advantages.max()}; look for a reward or a score that isn't finite")
        for role, score in self.scores.items():
            if score.shape != self.tokens.shape or not np.isfinite(score[self.trained]).all():
                self._fail(f"the {role} log-probabilities {score.shape} are not one finite number for each token")
        trained = self.logprobs[self.trained]
        if not np.isfinite(trained).all() or float(trained.max()) > 1e-3:
            self._fail(f"an engine log-probability is {float(trained.max())} (finite and not above 0 expected)")

    def _validate_experts(self, experts: np.ndarray) -> None:
        if experts.ndim != 3 or experts.shape[0] != len(self.tokens) - 1:
            self._fail(
                f"routed_experts has shape {experts.shape}; [{len(self.tokens) - 1}, layers, topk] expected: "
                "one row per token that was an input"
            )
        if experts.dtype not in (np.uint8, np.uint16):
            self._fail(f"routed_experts is {experts.dtype}; uint8 or uint16 expected")

    def validate_routing(self, moe_layers: int, topk: int, experts: int) -> None:
        """Raises RowError unless routed_experts fits a model of moe_layers x topk out of `experts`."""
        routed = self.routed_experts
        if routed is None:
            return
        if not moe_layers:
            self._fail("it carries routed experts, but the model has no MoE layer")
        if routed.shape[1:] != (moe_layers, topk):
            self._fail(
                f"routed_experts is for {routed.shape[1]} layers of {routed.shape[2]} experts; the model has "
                f"{moe_layers} MoE layers of top {topk}"
            )
        known = routed[~unknown_experts(routed)]
        if known.size and int(known.max()) >= experts:
            self._fail(f"expert {int(known.max())} was routed to, but the model has {experts}")
        ordered = np.sort(known, axis=-1)
        if topk > 1 and (ordered[..., 1:] == ordered[..., :-1]).any():
            self._fail("a token was routed twice to one expert; the recording is damaged")


def unknown_experts(routed: np.ndarray) -> np.ndarray:
    """bool [T-1]: the inputs whose recording is unknown, which has the largest value of its type throughout."""
    return (routed == np.iinfo(routed.dtype).max).all((1, 2))


@dataclass(frozen=True)
class StepSettings:
    """How one optimizer step is taken. The learning rate is this step's own: the schedule lives outside.

    algorithm: what makes the loss; constant_length is filled in where the reducer needs it.
    temperature: the sampling temperature, by which logits are divided.
    grad_clip: largest gradient norm; 0 does not clip.
    """

    learning_rate: float
    algorithm: AlgorithmSection = field(default_factory=AlgorithmSection)
    temperature: float = 1.0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; a finite number, 0 or more, is needed")
        if self.temperature <= 0 or self.grad_clip < 0:
            raise ValueError(
                f"temperature {self.temperature} must be above 0 and grad_clip {self.grad_clip} not negative"
            )


@dataclass(frozen=True)
class StepResult:
    """What a step did. Means run over the trained tokens that were run through the model; None: none was.

    loss: the value whose gradient was taken. grad_norm: before clipping, None when nothing was run.
    skipped: the weights were not touched, for skip_reason. gradients_not_finite: 1 where that was the reason.
    rows_skipped: rows that no term of the loss needs, not run;
    rows_masked: those of them that have no trained token.
    tokens: of all rows; computed_tokens: positions run by all ranks (prompts once per shared tree).
    experts_unknown: inputs without recorded experts in a batch that has others; rows_unrouted: rows not run because of it.
    prompts_not_shared: rows whose recorded prompt experts differ from their group's first row.
    experts_differ_fraction: token-layers where the trainer's own router would have chosen another set.
    sums: of the loss's terms over the trained tokens that were run (objective.SUMS).
    scores: by row float32 [2, T], log-probability and entropy of the trained tokens in this forward; None: not run.
    seconds: wall time of the phases plan, forward_backward, optimizer, total.
    """

    loss: float
    grad_norm: float | None
    skipped: bool
    skip_reason: str | None
    gradients_not_finite: int
    rows: int
    rows_skipped: int
    rows_masked: int
    tokens: int
    trained_tokens: int
    computed_tokens: int
    logprob_abs_diff_mean: float | None
    logprob_abs_diff_max: float | None
    entropy: float | None
    experts_differ_fraction: float | None
    prompts_not_shared: int
    experts_unknown: int
    rows_unrouted: int
    seconds: Mapping[str, float]
    sums: Mapping[str, float] = field(default_factory=dict)
    scores: Sequence[np.ndarray | None] = ()


COUNTS = (
    "rows", "rows_skipped", "rows_masked", "tokens", "trained_tokens", "computed_tokens", "prompts_not_shared",
    "experts_unknown", "rows_unrouted",
)  # fmt: skip
MEANS = ("loss", "grad_norm", "logprob_abs_diff_mean", "entropy", "experts_differ_fraction")


def merged(results: Sequence[StepResult]) -> StepResult:
    """The result of the several updates of a step: counts, sums and seconds add up, other numbers are means of the updates
    that ran. Skipped where none changed the weights."""
    if len(results) == 1:
        return results[0]

    def known(name: str) -> list[float]:
        return [value for result in results if (value := getattr(result, name)) is not None]

    def added(mappings: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: sum(m.get(name, 0.0) for m in mappings) for name in dict.fromkeys(k for m in mappings for k in m)}

    reasons = [result.skip_reason for result in results if result.skip_reason]
    numbers: dict[str, Any] = {name: sum(known(name)) for name in COUNTS}
    numbers |= {name: sum(known(name)) / len(known(name)) if known(name) else None for name in MEANS}
    return StepResult(
        **numbers,
        skipped=all(result.skipped for result in results),
        skip_reason="; ".join(reasons) or None,
        gradients_not_finite=sum(result.gradients_not_finite for result in results),
        logprob_abs_diff_max=max(known("logprob_abs_diff_max"), default=None),
        seconds=added([result.seconds for result in results]),
        sums=added([result.sums for result in results]),
        scores=[score for result in results for score in result.scores or [None] * result.rows],
    )
