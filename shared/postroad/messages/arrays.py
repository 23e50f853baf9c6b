"""Token arrays on the wire: raw little-endian bytes with a dtype and a shape, never lists of Python integers."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from pydantic import PlainSerializer, PlainValidator

DTYPES = {"u1", "u2", "i4", "i8", "f4"}


def to_wire(array: np.ndarray) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    code = little.dtype.str.lstrip("<|=")
    if code not in DTYPES:
        raise ValueError(f"an array of dtype {array.dtype} can't travel; use one of {sorted(DTYPES)}")
    return {"dtype": code, "shape": list(little.shape), "data": little.tobytes()}


def from_wire(value: Any) -> np.ndarray:
    """A read-only view of the bytes. Raises ValueError where dtype, shape and length do not agree."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, dict) or not {"dtype", "shape", "data"} <= value.keys():
        raise ValueError(f"an array needs dtype, shape and data, not {type(value).__name__}")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"unknown array dtype {value['dtype']!r}; known: {sorted(DTYPES)}")
    dtype = np.dtype("<" + value["dtype"])
    shape = tuple(value["shape"])
    if any(not isinstance(side, int) or side < 0 for side in shape):
        raise ValueError(f"array shape {shape!r} is not a list of sizes")
    if math.prod(shape) * dtype.itemsize != len(value["data"]):
        raise ValueError(f"an array of shape {shape} and dtype {dtype} needs other than {len(value['data'])} bytes")
    return np.frombuffer(value["data"], dtype=dtype).reshape(shape)


Array = Annotated[np.ndarray, PlainValidator(from_wire), PlainSerializer(to_wire)]
