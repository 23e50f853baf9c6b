"""Boxes, merged manifests and the plan of reads, over random layouts of trainers and engines."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postroad.weights import deltas
from postroad.weights.manifest import TensorEntry, WeightsError, merge
from postroad.weights.slices import cells, check_cover, intersection, runs, shape_of, shard, spread, whole, within
from postroad.weights.snapshot import Shard, Snapshot

RANKS = st.sampled_from([1, 2, 4])


def part_of(rank: int, tensor: np.ndarray, box, cuts=()):
    local = np.ascontiguousarray(tensor[within(box, whole(tensor.shape))])
    shards = [Shard("w", "float32", tensor.shape, box, local.view(np.uint8).reshape(-1))]
    snapshot = Snapshot.freeze_shards("r", 1, shards, lambda name, shape: cuts)
    return snapshot, snapshot.part(f"rank-{rank}", [])


@given(RANKS, st.integers(0, 1), RANKS, st.integers(0, 1), st.integers(1, 2))
@settings(deadline=None, max_examples=60)
def test_every_byte_of_a_shard_is_read_once_whatever_the_two_layouts(t_ranks, t_dim, e_ranks, e_dim, replicas):
    shape = (8, 12)
    tensor = np.arange(96, dtype=np.float32).reshape(shape)
    cuts = tuple(e_ranks if dimension == e_dim else 1 for dimension in range(2))
    held = [part_of(r, tensor, shard(shape, t_dim, r % t_ranks, t_ranks), cuts) for r in range(t_ranks * replicas)]
    tensors, buckets, sources = merge([part for _, part in held])
    assert tensors == [TensorEntry(name="w", dtype="float32", shape=shape)]
    for e_rank in range(e_ranks):
        wanted = shard(shape, e_dim, e_rank, e_ranks)
        needed = {n: b.size_bytes for n, b in enumerate(buckets) if intersection(b.box, wanted)}
        assert sum(needed.values()) == 96 * 4 // e_ranks, "buckets that the engine does not need are read"
        plan = spread(needed, {source.name: source.buckets() for source in sources})
        assert sorted(itertools.chain(*plan.values())) == sorted(needed), "each bucket from exactly one source"
        result = np.full(shape_of(wanted), -1, dtype=np.float32)
        for name, numbers in plan.items():
            snapshot = held[int(name.removeprefix("rank-"))][0]
            order = list(next(s for s in sources if s.name == name).buckets())
            for number in numbers:
                data = snapshot.bucket(order.index(number)).view(np.float32)
                box = buckets[number].box
                result[within(box, wanted)] = data.reshape(shape_of(box))
        assert np.array_equal(result, tensor[within(wanted, whole(shape))])
    for snapshot, _ in held:
        snapshot.close()


@given(st.lists(st.integers(1, 1000), min_size=80, max_size=200), st.integers(2, 6))
@settings(deadline=None)
def test_replicas_share_the_reads_within_a_tenth(sizes, count):
    buckets = dict(enumerate(sizes))
    plan = spread(buckets, {f"s{n}": buckets for n in range(count)})
    loads = [sum(buckets[b] for b in plan.get(f"s{n}", [])) for n in range(count)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes)
    if max(sizes) * 10 * count <= sum(sizes):
        assert max(loads) <= 1.1 * sum(sizes) / count


@given(st.lists(st.tuples(st.integers(1, 100), st.sets(st.integers(0, 3))), max_size=40))
def test_what_is_held_is_read_from_a_holder_and_what_nobody_holds_is_left_out(held):
    sizes = {number: size for number, (size, _) in enumerate(held)}
    holders = {f"s{s}": [n for n, (_, names) in enumerate(held) if s in names] for s in range(4)}
    plan = spread(sizes, holders)
    assert sorted(itertools.chain(*plan.values())) == [n for n, (_, names) in enumerate(held) if names]
    assert all(number in holders[name] for name, numbers in plan.items() for number in numbers)


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_cells_cover_a_box_once(shape, cuts):
    found = list(cells(whole(shape), shape, cuts, 4))
    check_cover("w", shape, found)
    assert len(set(found)) == len(found)


def test_large_tensors_are_cut_into_slabs():
    boxes = list(cells(whole((5, 3 << 20)), (5, 3 << 20), (), 4))
    assert [rows for rows, _ in boxes] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert list(cells((), (), (), 4)) == [()]
    assert list(cells(whole((0, 4)), (0, 4), (), 4)) == []


def test_ranks_that_do_not_fit_together_are_refused():
    tensor = np.arange(96, dtype=np.float32).reshape(8, 12)
    (_, left), (_, overlapping) = part_of(0, tensor, ((0, 4), (0, 12))), part_of(1, tensor, ((3, 8), (0, 12)))
    with pytest.raises(WeightsError, match="108 of 96 elements"):
        merge([left, overlapping])
    with pytest.raises(WeightsError, match="48 of 96 elements"):
        merge([left])
    (_, other), (_, right) = part_of(1, tensor + 1, ((0, 4), (0, 12))), part_of(2, tensor, ((4, 8), (0, 12)))
    with pytest.raises(WeightsError, match="rank-1 holds other bytes of w"):
        merge([left, right, other])
    with pytest.raises(WeightsError, match="overlap"):
        check_cover("w", (4, 2), [((0, 3), (0, 2)), ((2, 3), (0, 2))])


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_are_a_shorter_way_to_say_the_same(numbers):
    assert [n for first, stop in runs(numbers) for n in range(first, stop)] == numbers


@given(st.integers(1, 5000), st.floats(0, 0.1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_delta_makes_the_new_bucket_or_is_not_made(count, density, seed):
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 256, 2 * count, dtype=np.uint8)
    new = base.copy()
    changed = generator.random(count) < density
    new.view(np.uint16)[changed] ^= 3
    blob = deltas.encode(new, base)
    if blob is not None:
        assert len(blob) <= new.size / 2
        deltas.apply(np.frombuffer(blob, np.uint8), base)
        assert np.array_equal(base, new)
    assert deltas.encode(generator.integers(0, 256, 4096, dtype=np.uint8), np.zeros(4096, np.uint8)) is None


def test_a_broken_delta_is_an_error():
    with pytest.raises(ValueError, match="not a delta"):
        deltas.apply(np.zeros(10, np.uint8), np.zeros(100, np.uint8))
    blob = deltas.encode(np.zeros(math.prod((2, 50)), np.uint8), np.zeros(100, np.uint8))
    with pytest.raises(ValueError, match="100 bytes for a bucket of 90"):
        deltas.apply(np.frombuffer(blob, np.uint8), np.zeros(90, np.uint8))
