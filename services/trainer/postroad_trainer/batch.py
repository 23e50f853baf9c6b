"""What the trainer service hands to a backend and what it gets back. Plain data: no torch, no megatron."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Reducer = Literal["token", "sample", "constant"]


class RowError(ValueError):
    """A row that can't be trained; the message names the sample, the value and the remedy."""


@dataclass(frozen=True, eq=False)
class TrainRow:
    """One sample, ready for the optimizer step. T is its length, L its MoE layers, k the experts of a token.

    tokens: int32 [T], prompt first. loss_mask: uint8 [T], 1 where the token is trained.
    logprobs: float32 [T], the engine's log-probability of the token, 0 where the mask is 0.
    routed_experts: uint8 or uint16 [T-1, L, k]; row t holds the experts used when token t is the input.
    """

    sample_id: str
    group: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    advantage: float
    routed_experts: np.ndarray | None = None

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
            self._fail("no token is trained (the loss mask is all 0); drop the sample before the step")
        if int(self.loss_mask.max()) > 1:
            self._fail(f"the loss mask holds {int(self.loss_mask.max())}; only 0 and 1 have a meaning")
        if self.loss_mask[0]:
            self._fail("token 0 is trained, but nothing comes before it to predict it from; mask it")
        if not math.isfinite(self.advantage):
            self._fail(f"the advantage is {self.advantage}; look for a reward that isn't finite")
        trained = self.logprobs[self.loss_mask.astype(bool)]
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
        if int(routed.max()) >= experts:
            self._fail(f"expert {int(routed.max())} was routed to, but the model has {experts}")
        ordered = np.sort(routed, axis=-1)
        if topk > 1 and (ordered[..., 1:] == ordered[..., :-1]).any():
            self._fail("a token was routed twice to one expert; the recording is damaged")


@dataclass(frozen=True)
class StepSettings:
    """How one optimizer step is taken. The learning rate is this step's own: the schedule lives outside.

    clip_low, clip_high: the probability ratio is clipped to [1 - clip_low, 1 + clip_high].
    tis_cap: upper bound of the importance weight trainer/engine; None: no correction.
    temperature: the sampling temperature, by which logits are divided.
    grad_clip: largest gradient norm; 0 does not clip.
    constant_length: the divisor of the "constant" reducer, in tokens.
    """

    learning_rate: float
    clip_low: float = 0.2
    clip_high: float = 0.28
    tis_cap: float | None = 2.0
    temperature: float = 1.0
    grad_clip: float = 1.0
    reducer: Reducer = "token"
    constant_length: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; a finite number, 0 or more, is needed")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(f"clip_low {self.clip_low} must be in [0, 1) and clip_high {self.clip_high} not negative")
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(f"tis_cap is {self.tis_cap}; give a number above 0, or null for no correction")
        if self.temperature <= 0 or self.grad_clip < 0:
            raise ValueError(
                f"temperature {self.temperature} must be above 0 and grad_clip {self.grad_clip} not negative"
            )
        if self.reducer not in ("token", "sample", "constant"):
            raise ValueError(f"reducer is {self.reducer!r}; token, sample or constant expected")
        if self.reducer == "constant" and (self.constant_length or 0) < 1:
            raise ValueError("the constant reducer needs constant_length, a number of tokens of at least 1")


@dataclass(frozen=True)
class StepResult:
    """What a step did. Means run over the trained tokens that were run through the model; None: none was.

    loss: the value whose gradient was taken. grad_norm: before clipping, None when nothing was run.
    skipped: the weights were not touched, for skip_reason. rows_skipped: rows of advantage 0, not run.
    tokens: of all rows; computed_tokens: positions run by all ranks (prompts once per shared tree).
    prompts_not_shared: rows whose recorded prompt experts differ from their group's first row.
    experts_differ_fraction: token-layers where the trainer's own router would have chosen another set.
    seconds: wall time of the phases plan, forward_backward, optimizer, total.
    """

    loss: float
    grad_norm: float | None
    skipped: bool
    skip_reason: str | None
    rows: int
    rows_skipped: int
    tokens: int
    trained_tokens: int
    computed_tokens: int
    logprob_abs_diff_mean: float | None
    logprob_abs_diff_max: float | None
    clip_fraction: float | None
    tis_mean: float | None
    entropy: float | None
    kl_k3: float | None
    experts_differ_fraction: float | None
    prompts_not_shared: int
    seconds: Mapping[str, float]
