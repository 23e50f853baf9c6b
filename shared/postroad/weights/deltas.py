"""What changed in a bucket: its xor with the earlier one, compressed. Most bytes of it are zero where few weights moved.

Applied once, to exactly the bucket that it was made from; the bucket's own checksum proves the result.
"""

from __future__ import annotations

import numpy as np
import zstandard

LEVEL = 1
WORTH = 0.5  # a delta above this share of its bucket is not kept
_SAMPLE_BYTES = 64 * 1024


def encode(new: np.ndarray, base: np.ndarray) -> bytes | None:
    """The delta that makes `new` of `base` (uint8, same size), or None where it would not be worth it."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    middle = max(0, new.size // 2 - _SAMPLE_BYTES // 2)
    sample = np.bitwise_xor(new[middle : middle + _SAMPLE_BYTES], base[middle : middle + _SAMPLE_BYTES])
    if len(compressor.compress(sample.data)) > WORTH * sample.size:
        return None
    blob = compressor.compress(np.bitwise_xor(new, base).data)
    return blob if len(blob) <= WORTH * new.size else None


def apply(blob: np.ndarray, target: np.ndarray) -> None:
    """Turn the base in `target` into the new bucket. Raises ValueError where `blob` is no delta of this size."""
    try:
        changed = zstandard.ZstdDecompressor().decompress(blob.data, max_output_size=target.size)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a delta: {error}") from error
    if len(changed) != target.size:
        raise ValueError(f"a delta of {len(changed)} bytes for a bucket of {target.size}")
    np.bitwise_xor(target, np.frombuffer(changed, dtype=np.uint8), out=target)
