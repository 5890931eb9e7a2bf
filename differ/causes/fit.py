"""Arithmetic that finders share: sums over many records, and the share of a squared difference that an effect explains.

    explained share   1 - sum |a - undone(b)|^2 / sum |a - b|^2
    ratio             b ~ c a:  c = sum ab / sum aa,  residual sum (b - c a)^2,  standard error sqrt(residual / (n - 1) / sum aa)

Everything is accumulated record by record in float64, so that no finder holds more than the record at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

# A cause is shown from this share of the squared difference on.
SHOWN: Final = 0.99


def explained_share(difference_sq: float, residual_sq: float) -> float:
    """Share of a squared difference that is gone after undoing an effect: 1 all of it, 0 none; below 0 it got worse.

    0 where there was no difference to explain, or where a sum is not finite.
    """
    if not (difference_sq > 0.0 and math.isfinite(difference_sq) and math.isfinite(residual_sq)):
        return 0.0
    return 1.0 - residual_sq / difference_sq


def squared(values: Float64) -> float:
    """Sum of squares of an array of any shape."""
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


@dataclass(slots=True)
class Sums:
    """Sums over pairs of records: squared difference before and after undoing an effect.  `+=` adds another's."""

    difference: float = 0.0
    residual: float = 0.0

    @property
    def share(self) -> float:
        """The share that the effect explains."""
        return explained_share(self.difference, self.residual)

    def add(self, a: Float64, b: Float64, undone: Float64) -> None:
        """Add a record: both sides and b with the effect undone, all of as many elements."""
        self.difference += squared(a.reshape(-1) - b.reshape(-1))
        self.residual += squared(a.reshape(-1) - undone.reshape(-1))

    def __iadd__(self, other: Sums) -> Sums:
        self.difference += other.difference
        self.residual += other.residual
        return self


@dataclass(slots=True)
class RatioFit:
    """One ratio b = c a over all records that are added, by least squares through zero.

    Sums are kept of a and of d = b - a, so that a ratio near 1 keeps its digits.
    """

    count: int = 0
    aa: float = 0.0
    ad: float = 0.0
    dd: float = 0.0

    def add(self, a: Float64, b: Float64) -> None:
        """Add a record: both sides, of one shape."""
        x, d = a.reshape(-1), b.reshape(-1) - a.reshape(-1)
        self.count += x.size
        self.aa += float(np.dot(x, x))
        self.ad += float(np.dot(x, d))
        self.dd += float(np.dot(d, d))

    def __iadd__(self, other: RatioFit) -> RatioFit:
        self.count += other.count
        self.aa += other.aa
        self.ad += other.ad
        self.dd += other.dd
        return self

    @property
    def ab(self) -> float:
        """Sum ab."""
        return self.aa + self.ad

    @property
    def bb(self) -> float:
        """Sum bb."""
        return max(0.0, self.aa + 2.0 * self.ad + self.dd)

    @property
    def excess(self) -> float:
        """c - 1, to its own precision; nan where a is all zero."""
        return self.ad / self.aa if self.aa > 0.0 else math.nan

    @property
    def ratio(self) -> float:
        """c of b = c a; nan where a is all zero."""
        return 1.0 + self.excess

    @property
    def difference(self) -> float:
        """Sum (a - b)^2."""
        return self.dd

    @property
    def residual(self) -> float:
        """Sum (b - c a)^2."""
        return max(0.0, self.dd - self.ad * self.ad / self.aa) if self.aa > 0.0 else self.dd

    @property
    def error(self) -> float:
        """Standard error of the ratio."""
        if self.count < 2 or not self.aa > 0.0:
            return math.inf
        return math.sqrt(self.residual / (self.count - 1) / self.aa)

    @property
    def share(self) -> float:
        """Share of the squared difference that the one ratio explains."""
        return explained_share(self.difference, self.residual)

    @property
    def correlation(self) -> float:
        """Cosine of the two sides; 0 where one is all zero."""
        scale = math.sqrt(self.aa * self.bb)
        return self.ab / scale if scale > 0.0 else 0.0
