"""The numbers that bf16 and fp16 can hold: rounding to them, and whether values lie on them."""

from __future__ import annotations

from typing import Final

import numpy as np

from differ.causes.fit import Float64
from tracer.dtypes import BFLOAT16, bf16_to_float32, float32_to_bf16

GRIDS: Final = (BFLOAT16, "float16")
# bfloat16 keeps the upper half of a float32's bits.
_UPPER: Final = np.uint32(0xFFFF0000)


def round_to(values: Float64, grid: str) -> Float64:
    """float32 values (as float64) rounded to nearest even in bf16 or fp16, as float64; too large becomes inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        if grid == BFLOAT16:
            return bf16_to_float32(float32_to_bf16(values.astype(np.float32))).astype(np.float64)
        return values.astype(np.float32).astype(np.float16).astype(np.float64)


def truncate_to(values: Float64, grid: str) -> Float64:
    """The same, rounded towards zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        if grid == BFLOAT16:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & _UPPER
            return bits.view(np.float32).astype(np.float64)
        nearest = values.astype(np.float32).astype(np.float16)
        toward = np.nextafter(nearest, np.float16(0.0))
        return np.where(np.abs(nearest.astype(np.float64)) > np.abs(values), toward, nearest).astype(np.float64)


def on_grid(values: Float64, grid: str) -> bool:
    """Whether every value is one that the dtype can hold."""
    return bool(np.array_equal(round_to(values, grid), values, equal_nan=True))
