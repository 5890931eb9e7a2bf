"""How well recorded outputs fit a replay of them.

    fits  <=>  |r| <= |s|  and  max |r_i| / s_i <= spike  and  |p.r| / p.p <= length

with r the residual, s what rounding may cost, element by element, and p what was expected: the norm is the robust measure,
the largest element sees what a norm over a large tensor would bury, and `length` (where a rule sets one) what noise in all
elements would.  NaN fits NaN, and an infinity itself.
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
    length: float = math.inf
    along: float = 0.0
    size2: float = 0.0

    def add_along(self, residual: Float64, step: Float64) -> None:
        """Add one block of a residual and of what it is the residual of."""
        self.along += float(np.dot(residual, step))
        self.size2 += float(np.dot(step, step))

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

    @staticmethod
    def none(spike: float) -> Fit:
        """The fit of a rule that says nothing of these inputs."""
        return Fit(spike, residual2=math.inf, largest=math.inf)

    @property
    def margin(self) -> float:
        """Observed over allowed, 1 being the limit."""
        if self.residual2 == 0.0:
            return 0.0
        share = math.sqrt(self.residual2 / self.allowed2) if self.allowed2 > 0.0 else math.inf
        longer = abs(self.along) / self.size2 / self.length if self.size2 > 0.0 else 0.0
        return max(share, self.largest / self.spike, longer)

    @property
    def ok(self) -> bool:
        """Whether the recorded outputs follow."""
        return self.margin <= 1.0
