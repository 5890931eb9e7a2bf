"""The numbers that bf16 and fp16 can hold: rounding to them, and whether values lie on them."""

from __future__ import annotations

from typing import Final

import numpy as np

from differ.causes.fit import Float64
from tracer.dtypes import BFLOAT16, bf16_to_float32, float32_to_bf16

GRIDS: Final = (BFLOAT16, "float16")
# Binary digits after the first one, and the distance of the smallest numbers from each other.
_SPACING: Final = {BFLOAT16: (7, 2.0**-133), "float16": (10, 2.0**-24)}


def round_to(values: Float64, grid: str) -> Float64:
    """float32 values (as float64) rounded to nearest even in bf16 or fp16, as float64; too large becomes inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        if grid == BFLOAT16:
            return bf16_to_float32(float32_to_bf16(values.astype(np.float32))).astype(np.float64)
        return values.astype(np.float32).astype(np.float16).astype(np.float64)


def outside(values: Float64, rounded: Float64, grid: str, *, nearest: bool) -> Float64:
    """How far values lie outside of those that rounding makes `rounded` of, in its direction; 0 for those within.

    The cell of a number is half a unit to either side, or towards zero one unit away from it.
    """
    digits, smallest = _SPACING[grid]
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.where(
            rounded == 0.0, smallest, np.maximum(np.ldexp(1.0, np.frexp(rounded)[1] - 1 - digits), smallest)
        )
        apart = values - rounded
        if nearest:
            return np.asarray(np.sign(apart) * np.maximum(np.abs(apart) - unit / 2, 0.0))
        away = np.where(rounded == 0.0, np.abs(apart), apart * np.sign(rounded))
        return np.where(away < 0.0, away, np.maximum(away - unit, 0.0))


def on_grid(values: Float64, grid: str) -> bool:
    """Whether every value is one that the dtype can hold."""
    return bool(np.array_equal(round_to(values, grid), values, equal_nan=True))
