"""Where an engine collects a version beside the weights that it serves: one image, reused from version to version."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from postroad.weights.manifest import Bucket, Layout, Manifest, TensorEntry
from postroad.weights.protocol import WeightsError
from postroad.weights.slices import Box, intersection, shape_of, whole, within
from postroad.weights.snapshot import Image

Want = Callable[[TensorEntry], Box | None]  # the box of a tensor that this engine rank needs; None: nothing of it


class Staging:
    """`found` says what content (checksum) is known to lie where a bucket belongs; what is not there is to be read."""

    def __init__(self, name: str, want: Want | None = None) -> None:
        self.image = Image(f"postroad-staging-{name}")
        self.offsets: dict[int, int] = {}
        self.found: dict[int, str] = {}
        self._want = want or (lambda entry: whole(entry.shape))
        self._places: list[tuple[str, str, Box, int]] = []

    def prepare(self, manifest: Manifest) -> dict[int, str]:
        """Lay out what `manifest` has for this engine; the checksum of each bucket that is not there already."""
        boxes = [self._want(entry) for entry in manifest.tensors]
        layout, offsets, places = Layout(), {}, []
        in_order = sorted(
            range(len(manifest.buckets)), key=lambda n: (manifest.buckets[n].tensor, manifest.buckets[n].box)
        )
        for number in in_order:
            bucket = manifest.buckets[number]
            box, entry = boxes[bucket.tensor], manifest.tensors[bucket.tensor]
            if box is not None and intersection(bucket.box, box) is not None:
                offsets[number] = layout.add(bucket.tensor, bucket.size_bytes)
                places.append((entry.name, entry.dtype, bucket.box, offsets[number]))
        known = list(self.found.values()) if places == self._places else [""] * len(places)
        if places != self._places:
            if layout.size_bytes != self.image.size_bytes:
                self.image.close()
                self.image = Image(self.image.name, layout.size_bytes)
            self._places = places
        self.offsets = offsets
        self.found = dict(zip(offsets, known, strict=True))
        return {n: manifest.buckets[n].checksum for n, has in self.found.items() if has != manifest.buckets[n].checksum}

    def target(self, number: int, bucket: Bucket) -> np.ndarray:
        offset = self.offsets[number]
        return self.image.bytes[offset : offset + bucket.size_bytes]

    def tensors(self, manifest: Manifest) -> Iterator[tuple[TensorEntry, np.ndarray]]:
        """Each wanted tensor (its entry with the shape of this engine's box) and its bytes. They are views of the image
        where the buckets lie as the tensor does, copies elsewhere; valid until the next pull."""
        of_tensor: dict[int, list[int]] = {}
        for number in self.offsets:
            of_tensor.setdefault(manifest.buckets[number].tensor, []).append(number)
        for index, entry in enumerate(manifest.tensors):
            box = self._want(entry)
            if box is None:
                continue
            local = entry.model_copy(update={"shape": shape_of(box)})
            numbers = of_tensor.get(index, [])
            if math.prod(local.shape) and not numbers:
                raise WeightsError(f"version {manifest.version} has nothing of {entry.name}")
            yield local, self._assemble(manifest, numbers, local, box)

    def _assemble(self, manifest: Manifest, numbers: list[int], local: TensorEntry, box: Box) -> np.ndarray:
        boxes = [manifest.buckets[number].box for number in numbers]
        if not numbers or _is_stack(boxes, box):
            start = self.offsets[numbers[0]] if numbers else 0
            return self.image.bytes[start : start + local.size_bytes]
        whole_box = np.empty((*local.shape, local.item_size), dtype=np.uint8)
        for number, cell in zip(numbers, boxes, strict=True):
            data = self.target(number, manifest.buckets[number]).reshape(*shape_of(cell), local.item_size)
            common = intersection(cell, box)
            if common is not None:
                whole_box[within(common, box)] = data[within(common, cell)]
        return whole_box.reshape(-1)

    def close(self) -> None:
        self.image.close()


def _is_stack(boxes: list[Box], box: Box) -> bool:
    """Are `boxes` slabs that together are `box`, one after another in its row-major order?"""
    if not box:
        return True
    follow = all(one[0][1] == other[0][0] for one, other in itertools.pairwise(boxes))
    return follow and all(b[1:] == box[1:] for b in boxes) and (boxes[0][0][0], boxes[-1][0][1]) == box[0]
