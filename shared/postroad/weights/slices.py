"""Boxes of tensors, and who reads which of them from where: pure functions.

A box is (start, stop) per dimension. A tensor is cut into boxes so small that each is one contiguous read with one
checksum: at the borders of the ranks that hold it, at the borders that the publisher was told engines need, and into
slabs of at most BUCKET_BYTES. A reader takes every box that its shard touches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from postroad.weights.protocol import WeightsError

BUCKET_BYTES = 16 * 1024 * 1024

Box = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]


def whole(shape: Shape) -> Box:
    return tuple((0, side) for side in shape)


def shard(shape: Shape, dimension: int, rank: int, ranks: int) -> Box:
    """The part of `rank` of a tensor that is split evenly along `dimension`."""
    side = shape[dimension]
    if side % ranks:
        raise WeightsError(f"dimension {dimension} of shape {shape} can't be split over {ranks} ranks")
    part = (rank * side // ranks, (rank + 1) * side // ranks)
    return (*whole(shape)[:dimension], part, *whole(shape)[dimension + 1 :])


def shape_of(box: Box) -> Shape:
    return tuple(stop - start for start, stop in box)


def intersection(one: Box, other: Box) -> Box | None:
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(start < stop for start, stop in both) else None


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The index of `box` in an array that holds `outer`."""
    return tuple(slice(start - o, stop - o) for (start, stop), (o, _) in zip(box, outer, strict=True))


def cells(box: Box, shape: Shape, cuts: Sequence[int], item_size: int) -> Iterator[Box]:
    """Cut `box` of a tensor of `shape` into boxes, in row-major order: `cuts` is into how many equal parts the whole
    tensor is cut along each dimension (1 where it is missing)."""
    sides = []
    for dimension, (start, stop) in enumerate(box):
        parts = cuts[dimension] if dimension < len(cuts) else 1
        step = math.ceil(shape[dimension] / parts) or 1
        borders = [start, *(b for b in range(step, shape[dimension], step) if start < b < stop), stop]
        sides.append(list(itertools.pairwise(borders)))
    for cell in itertools.product(*sides):
        yield from _slabs(cell, item_size)


def _slabs(box: Box, item_size: int) -> Iterator[Box]:
    size = math.prod(shape_of(box)) * item_size
    if size <= BUCKET_BYTES:
        if size:
            yield box
        return
    (start, stop), *rest = box
    rows = max(1, BUCKET_BYTES // (size // (stop - start)))
    for first in range(start, stop, rows):
        yield ((first, min(first + rows, stop)), *rest)


def check_cover(name: str, shape: Shape, boxes: Collection[Box]) -> None:
    """Raises WeightsError unless `boxes` cover every element of a tensor exactly once."""
    held = sum(math.prod(shape_of(box)) for box in boxes)
    if held != math.prod(shape):
        raise WeightsError(f"{name}: {held} of {math.prod(shape)} elements are held by the ranks together")
    by_row = sorted(boxes)
    for number, box in enumerate(by_row):
        for other in itertools.islice(by_row, number + 1, None):
            if box and other[0][0] >= box[0][1]:
                break  # sorted by first row: no later box can touch this one
            if intersection(box, other) is not None:
                raise WeightsError(f"{name}: {box} and {other} overlap; ranks must cut it at the same borders")


def spread(sizes: Mapping[int, int], holders: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Which of the buckets (`sizes`, in bytes) to read from which holder: each from one, and no holder has more than
    one bucket more to send than another that could send it instead. What nobody holds is left out."""
    of_bucket: dict[int, list[str]] = {bucket: [] for bucket in sizes}
    for name, held in holders.items():
        for bucket in held:
            if bucket in of_bucket:
                of_bucket[bucket].append(name)
    load = dict.fromkeys(holders, 0)
    plan: dict[str, list[int]] = {name: [] for name in holders}
    for bucket in sorted(sizes, key=lambda b: (len(of_bucket[b]), -sizes[b], b)):
        if names := of_bucket[bucket]:
            least = min(names, key=lambda name: load[name])
            plan[least].append(bucket)
            load[least] += sizes[bucket]
    return {name: sorted(buckets) for name, buckets in plan.items() if buckets}


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as [first, stop), in the order given."""
    out: list[tuple[int, int]] = []
    for number in numbers:
        if out and out[-1][1] == number:
            out[-1] = (out[-1][0], number + 1)
        else:
            out.append((number, number + 1))
    return out
