"""Trees and micro-batches: every trained token is predicted once, from exactly the tokens before it in its row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postroad_trainer.backend.layout import Limits, Tree, build_trees, plan
from postroad_trainer.backend.log_probabilities import TokenLogProbabilities
from postroad_trainer.backend.visibility import Layout, Stripe
from postroad_trainer.batch import TrainRow

BUDGET = 40


@st.composite
def batches(draw: st.DrawFn) -> list[TrainRow]:
    """Rows over few prompts, so that they share; masks with holes; tokens are drawn from few ids, so that they repeat."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=3))
    rows = []
    for number in range(draw(st.integers(1, 8))):
        prompt = draw(st.sampled_from(prompts))
        response = draw(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=10))
        tokens = np.array([*prompt, 1, *(token for token, _ in response)], np.int32)
        mask = np.array([0] * len(prompt) + [1] + [int(trained) for _, trained in response], np.uint8)
        rows.append(TrainRow(str(number), f"g{len(prompt)}", tokens, mask, np.zeros(len(tokens), np.float32), 1.0))
    return rows


def _seen(tree: Tree, visible: np.ndarray, source: int) -> list[tuple[int, int]]:
    """(position, token) of everything that the prediction at `source` depends on, in order of position."""
    places = np.flatnonzero(visible[source, : len(tree)])
    return sorted(zip(tree.positions[places].tolist(), tree.tokens[places].tolist(), strict=True))


@given(batches(), st.integers(0, 30))
def test_a_prediction_sees_its_row_and_nothing_else(rows: list[TrainRow], tree_tokens: int) -> None:
    trees, not_shared = build_trees(list(enumerate(rows)), tree_tokens)
    assert not_shared == 0
    predicted = []
    layout = Layout(trees, torch.device("cpu"))
    for tree, visible in zip(trees, layout.padded.visible[:, 0].numpy(), strict=True):
        assert len(tree) <= tree_tokens or len(set(tree.segments.tolist())) <= 2
        for source, target, row, place in zip(tree.source, tree.target, tree.row, tree.place, strict=True):
            assert _seen(tree, visible, source) == list(enumerate(rows[row].tokens[:place].tolist()))
            assert target == rows[row].tokens[place]
            predicted.append((int(row), int(place)))
    wanted = [(index, int(place)) for index, row in enumerate(rows) for place in np.flatnonzero(row.loss_mask)]
    assert sorted(predicted) == wanted


@given(batches(), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_the_ranks_share_the_work_and_keep_in_step(rows: list[TrainRow], ranks: int, positions: int) -> None:
    plans = [
        plan(list(enumerate(rows)), Limits(12, BUDGET, positions=positions, micro_batches=2), rank, ranks)
        for rank in range(ranks)
    ]
    assert len({len(one.micro_batches) for one in plans}) == 1 and len(plans[0].micro_batches) % 2 == 0
    assert all(sum(map(len, batch)) % positions == 0 for one in plans for batch in one.micro_batches)
    trees = [tree for one in plans for batch in one.micro_batches for tree in batch]
    assert sum(len(tree.target) for tree in trees) == sum(int(row.loss_mask.sum()) for row in rows)
    assert sum(len(tree) for tree in trees if len(tree.target)) == plans[0].computed_tokens
    assert all(sum(map(len, batch)) <= BUDGET for one in plans for batch in one.micro_batches)


@given(batches(), st.integers(1, 3))
def test_stripes_see_together_what_the_whole_sees(rows: list[TrainRow], size: int) -> None:
    trees, _ = build_trees(list(enumerate(rows)), 30)
    whole = Layout(trees, torch.device("cpu"))
    total = len(whole.positions)
    gathered = torch.cat([torch.arange(total)[rank::size] for rank in range(size)])
    seen = _pairs(whole, torch.arange(total), torch.arange(total))
    for rank in range(size):
        stripe = Stripe(rank, size)
        layout = Layout(trees, torch.device("cpu"), stripe)
        mine = stripe.of(torch.arange(total))
        for side, count in ((layout.padded.queries, len(mine)), (layout.padded.keys, total)):
            assert torch.equal(side.padded[side.slots], torch.arange(count))
        assert layout.padded.visible.any(-1).all()
        assert torch.equal(layout.positions, stripe.of(whole.positions))
        assert torch.equal(_pairs(layout, mine, gathered)[mine], seen[mine])


@given(batches())
def test_spans_see_what_the_mask_lets_see(rows: list[TrainRow]) -> None:
    trees, _ = build_trees(list(enumerate(rows)), 30)
    layout, total = Layout(trees, torch.device("cpu")), sum(map(len, trees))
    spans, seen = layout.spans, torch.zeros(total, total, dtype=torch.bool)
    keys = torch.arange(total) if spans.keys is None else spans.keys
    for number in range(len(spans.query_ends) - 1):
        queries = range(int(spans.query_ends[number]), int(spans.query_ends[number + 1]))
        of_span = keys[spans.key_ends[number] : spans.key_ends[number + 1]]
        assert len(queries) <= spans.longest_query and len(of_span) <= spans.longest_key
        for place, query in enumerate(queries):  # causal, aligned to the ends
            seen[query, of_span[: len(of_span) - len(queries) + place + 1]] = True
    everything = torch.arange(total)
    assert torch.equal(seen, _pairs(layout, everything, everything))


def _pairs(layout: Layout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[T, T]: which position sees which."""
    seen = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    trees, _, length, width = layout.padded.visible.shape
    for slot, query in zip(layout.padded.queries.slots.tolist(), queries.tolist(), strict=True):
        row = torch.zeros(trees * width, dtype=torch.bool)
        row[slot // length * width : (slot // length + 1) * width] = layout.padded.visible[
            slot // length, 0, slot % length
        ]
        seen[query, keys] = row[layout.padded.keys.slots]
    return seen


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [11, 3_000_000])
def test_log_probabilities_are_those_of_log_softmax(vocabulary: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, vocabulary, requires_grad=True)
    which, target = torch.tensor([0, 0, 1, 3, 0]), torch.tensor([5, 5, 0, 10, 2])
    weight = torch.randn(5)
    got, entropy = TokenLogProbabilities.apply(logits, which, target, temperature)
    (gradient,) = torch.autograd.grad((got * weight).sum(), logits)
    reference = torch.log_softmax(logits / temperature, -1)
    (wanted,) = torch.autograd.grad((reference[which, target] * weight).sum(), logits)
    assert torch.allclose(got, reference[which, target], atol=1e-5)
    assert torch.allclose(entropy, -(reference.exp() * reference).sum(-1), atol=1e-4)
    assert torch.allclose(gradient, wanted, atol=1e-6)
