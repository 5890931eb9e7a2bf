"""Are two tensors two random draws, and of one distribution?  Arithmetic for `init.draw` and `init.scale`.

    independent   |correlation| <= 5 / sqrt(n), of a record and of all records together
    scale         s = std(b) / std(a);  standard error of log s = sqrt((kurt(a) - 1 + kurt(b) - 1) / n) / 2
    shape         two-sample Kolmogorov-Smirnov distance of a / std(a) and b / std(b):  D <= 2.69 sqrt((n + m) / (n m))
    share         1 - max(0, |2 sum ab| - 2 * 5 sqrt(sum a^2 b^2)) / sum (a - b)^2

The last line: independent draws differ by sum a^2 + sum b^2, up to what chance makes of sum ab, and an effect that is
shared by both sides would show in that sum.  2.69 is the Kolmogorov-Smirnov limit for one false alarm in a million.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from differ.causes.fit import Float64, explained_share

# Standard errors that chance is given.
CHANCE: Final = 5.0
KS_LIMIT: Final = 2.69
# A record with fewer elements says nothing; one whose sides are this much alike is no new draw, however small it is.
SMALLEST: Final = 8
ALIKE: Final = 0.9
ALIKE_TOGETHER: Final = 0.5
# Elements kept for the comparison of shapes: of one record, and of all.
SAMPLE: Final = 2**13
SAMPLES: Final = 2**17


@dataclass(frozen=True, slots=True)
class Draw:
    """One record as two draws: centred sums, log of the ratio of the spreads and its variance, a sample of each side."""

    name: str
    count: int
    aa: float
    ab: float
    bb: float
    chance_sq: float
    log_scale: float
    variance: float
    sample_a: Float64
    sample_b: Float64


def measure(name: str, a: Float64, b: Float64) -> Draw | None:
    """One record, or None if it is too small, constant, not finite, or its sides go together."""
    x, y = a.reshape(-1) - a.mean(), b.reshape(-1) - b.mean()
    n = x.size
    aa, ab, bb = float(x @ x), float(x @ y), float(y @ y)
    if n < SMALLEST or not (aa > 0.0 and bb > 0.0 and math.isfinite(aa + bb)):
        return None
    if abs(ab) > min(ALIKE, CHANCE / math.sqrt(n)) * math.sqrt(aa * bb):
        return None
    kurtosis = [float(np.mean(v**4)) / (s / n) ** 2 for v, s in ((x, aa), (y, bb))]
    variance = max(sum(kurtosis) - 2.0, 1e-3) / n / 4.0
    log_scale = 0.5 * math.log(bb / aa)
    step = max(1, n // SAMPLE)
    spread = math.sqrt(aa / n), math.sqrt(bb / n)
    return Draw(
        name, n, aa, ab, bb, float((x * x) @ (y * y)), log_scale, variance, x[::step] / spread[0], y[::step] / spread[1]
    )


@dataclass(slots=True)
class Draws:
    """Records that may be new draws; `verdict` looks at all of them together."""

    records: list[Draw] = field(default_factory=list)
    kept: int = 0

    def add(self, draw: Draw) -> None:
        """Add a record; once enough values are kept, only its sums."""
        self.kept += draw.sample_a.size
        if self.kept > SAMPLES:
            nothing = np.zeros(0)
            draw = Draw(
                draw.name, draw.count, draw.aa, draw.ab, draw.bb, draw.chance_sq, draw.log_scale, draw.variance,
                nothing, nothing,
            )  # fmt: skip
        self.records.append(draw)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the records, sorted."""
        return tuple(sorted(draw.name for draw in self.records))

    @property
    def scale(self) -> tuple[float, float]:
        """log of std(b) / std(a) over all records, weighted by its precision, and its standard error."""
        weights = [1.0 / draw.variance for draw in self.records]
        mean = sum(w * draw.log_scale for w, draw in zip(weights, self.records, strict=True)) / sum(weights)
        return mean, math.sqrt(1.0 / sum(weights))

    @property
    def same_scale(self) -> bool:
        """Whether the spreads agree within what chance allows."""
        mean, error = self.scale
        return abs(mean) <= CHANCE * error

    @property
    def independent(self) -> bool:
        """Whether all records together are uncorrelated, equally scaled to each other, and of one shape."""
        if not self.records:
            return False
        count = sum(draw.count for draw in self.records)
        # Each record counts in units of its own spreads, so that a large one does not hide the others.
        together = sum(draw.count * draw.ab / math.sqrt(draw.aa * draw.bb) for draw in self.records) / count
        if abs(together) > min(ALIKE_TOGETHER, CHANCE / math.sqrt(count)):
            return False
        mean, _ = self.scale
        if any(abs(draw.log_scale - mean) > CHANCE * math.sqrt(draw.variance) for draw in self.records):
            return False
        return _one_shape(
            *(np.concatenate([getattr(draw, side) for draw in self.records]) for side in ("sample_a", "sample_b"))
        )

    @property
    def share(self) -> float:
        """Share of the squared difference that two independent draws explain."""
        difference = sum(draw.aa + draw.bb - 2.0 * draw.ab for draw in self.records)
        shared = abs(2.0 * sum(draw.ab for draw in self.records))
        chance = 2.0 * CHANCE * math.sqrt(sum(draw.chance_sq for draw in self.records))
        return explained_share(difference, max(0.0, shared - chance))


def _one_shape(x: Float64, y: Float64) -> bool:
    """Two-sample Kolmogorov-Smirnov test."""
    x, y = np.sort(x), np.sort(y)
    both = np.concatenate([x, y])
    distance = np.abs(np.searchsorted(x, both, "right") / x.size - np.searchsorted(y, both, "right") / y.size).max()
    return bool(distance <= KS_LIMIT * math.sqrt((x.size + y.size) / (x.size * y.size)))
