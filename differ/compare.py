"""Measure how two tensors of one shape differ, in float64, a block at a time.

    rel_l2 = |a - b| / max(|a|, |b|, floor)          over the elements that are finite on both sides
    ulp    = distance of the two numbers in representable steps of the coarser dtype

NaN equals NaN, and an infinity one of its sign, only at the same place.  Nothing here knows a tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from differ.align import BLOCK, Tensor
from tracer.dtypes import BFLOAT16, coarser, float32_to_bf16, is_float

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distance:
    """Difference of two tensors.

    `diff`, `a` and `b` are L2 norms over the finite elements, `max_abs` the largest |a - b| and `at` its flat index.
    `nonfinite` is the flat index of the first element that is nan or inf on one side only (or another one), -1 if
    there is none.
    """

    diff: float
    a: float
    b: float
    max_abs: float
    at: int
    nonfinite: int

    def rel_l2(self, floor: float = 0.0) -> float:
        """Relative L2 error; 0 where both sides are zero."""
        scale = max(self.a, self.b, floor)
        return self.diff / scale if scale > 0.0 else 0.0

    @property
    def equal(self) -> bool:
        """Whether the numbers are the same (the bits may not be: -0.0, another dtype)."""
        return self.max_abs == 0.0 and self.nonfinite < 0


def distance(a: Tensor, b: Tensor) -> Distance:
    """Distance of two tensors of one shape."""
    diff2 = a2 = b2 = 0.0
    max_abs, at, nonfinite = -1.0, 0, -1
    for start in a.blocks():
        x, y = a.block(start, start + BLOCK), b.block(start, start + BLOCK)
        if not (math.isfinite(float(np.dot(x, x))) and math.isfinite(float(np.dot(y, y)))):
            x, y, odd = _pair_nonfinite(x, y)
            if odd >= 0 and nonfinite < 0:
                nonfinite = start + odd
        delta = x - y
        diff2 += float(np.dot(delta, delta))
        a2 += float(np.dot(x, x))
        b2 += float(np.dot(y, y))
        largest = np.abs(delta)
        where = int(largest.argmax())
        if largest[where] > max_abs:
            max_abs, at = float(largest[where]), start + where
    return Distance(math.sqrt(diff2), math.sqrt(a2), math.sqrt(b2), max(max_abs, 0.0), at, nonfinite)


def _pair_nonfinite(x: Float64, y: Float64) -> tuple[Float64, Float64, int]:
    """Both blocks with every place that is not finite on both sides set to zero, and the first that does not match."""
    finite = np.isfinite(x) & np.isfinite(y)
    matching = finite | (np.isnan(x) & np.isnan(y)) | (x == y)
    odd = -1 if matching.all() else int(np.argmin(matching))
    # A value whose square overflows is finite and stays; its norm is then inf, and so is the difference's.
    return np.where(finite, x, 0.0), np.where(finite, y, 0.0), odd


def max_ulp(a: Tensor, b: Tensor) -> int | None:
    """Largest distance in representable numbers of the coarser dtype; None for integers and for no finite element."""
    dtype = coarser(a.dtype, b.dtype)
    if not is_float(dtype):
        return None
    largest = None
    for start in a.blocks():
        x, y = a.block(start, start + BLOCK), b.block(start, start + BLOCK)
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            steps = _ordered(x[finite], dtype) - _ordered(y[finite], dtype)
            largest = max(largest or 0, int(np.abs(steps).max()))
    return largest


def _ordered(values: Float64, dtype: str) -> npt.NDArray[np.int64]:
    """Numbers of a float dtype as integers in the same order, one apart where the numbers are neighbours."""
    with np.errstate(over="ignore"):
        if dtype == BFLOAT16:
            bits = float32_to_bf16(values.astype(np.float32)).view(np.int16).astype(np.int64)
            low = -(2**15)
        else:
            native = values.astype(dtype)
            bits = native.view(f"i{native.dtype.itemsize}").astype(np.int64)
            low = -(2 ** (8 * native.dtype.itemsize - 1))
    return np.where(bits < 0, low - bits, bits)


def same_integers(a: Tensor, b: Tensor) -> int:
    """Flat index of the first element at which two integer (or bool) tensors differ, -1 if none: exact, any widths."""
    for start in a.blocks():
        unequal = a.raw(start, start + BLOCK) != b.raw(start, start + BLOCK)
        if unequal.any():
            return start + int(np.argmax(unequal))
    return -1


def multi_index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index into a tensor of that shape."""
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()


def element(tensor: Tensor, flat: int) -> float | int:
    """One element as a Python number, exact."""
    if is_float(tensor.dtype):
        return float(tensor.block(flat, flat + 1)[0])
    return int(tensor.raw(flat, flat + 1)[0])
