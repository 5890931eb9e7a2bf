"""How well recorded outputs fit a replay of them.

    fits  <=>  |r| <= |s|  and  max |r_i| / s_i <= spike

with r the residual and s what rounding may cost, element by element: the norm is the robust measure, the largest
element sees what a norm over a large tensor would bury.  NaN fits NaN, and an infinity itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.compare import Float64

# Half-precision, bfloat16 and float32 kernels may flush what is smaller to zero.
SMALLEST_NORMAL: Final = {"float64": 2.3e-308, "float32": 1.2e-38, "float16": 6.2e-5, "bfloat16": 1.2e-38}


@dataclass(slots=True)
class Fit:
    """Residual of a replay, accumulated over blocks."""

    spike: float
    residual2: float = 0.0
    allowed2: float = 0.0
    largest: float = 0.0
    at: int = 0
    recorded: float = 0.0
    expected: float = 0.0

    def add(self, start: int, recorded: Float64, expected: Float64, allowed: Float64) -> None:
        """Add one block: what was recorded, what the replay gives, what each element may be off by (all > 0)."""
        residual = np.abs(recorded - expected)
        if not math.isfinite(float(residual.sum())):
            matching = (np.isnan(recorded) & np.isnan(expected)) | (recorded == expected)
            residual = np.where(matching, 0.0, residual)
            residual[np.isnan(residual)] = np.inf
            allowed = np.where(np.isfinite(allowed), allowed, 0.0) + 1e-300
        self.residual2 += float(np.dot(residual, residual))
        self.allowed2 += float(np.dot(allowed, allowed))
        share = residual / allowed
        worst = int(share.argmax()) if share.size else 0
        if share.size and float(share[worst]) > self.largest:
            self.largest, self.at = float(share[worst]), start + worst
            self.recorded, self.expected = float(recorded[worst]), float(expected[worst])

    @property
    def margin(self) -> float:
        """Observed over allowed, 1 being the limit."""
        if self.residual2 == 0.0:
            return 0.0
        share = math.sqrt(self.residual2 / self.allowed2) if self.allowed2 > 0.0 else math.inf
        return max(share, self.largest / self.spike)

    @property
    def ok(self) -> bool:
        """Whether the recorded outputs follow."""
        return self.margin <= 1.0
