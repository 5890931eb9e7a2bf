"""Interval of a binomial rate.

Wilson's score interval: with p = k / n and z the normal quantile,

    (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal of the American
Statistical Association 22 (1927), 209-212.  It stays within 0 and 1 and has a width at k = 0 and k = n too.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson(passed: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper end of the rate's interval; (0, 1) without a run.  Raises ValueError for impossible counts."""
    if not 0 <= passed <= runs:
        raise ValueError(f"{passed} of {runs}")
    if runs == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, square = passed / runs, z * z / runs
    half = z * math.sqrt(rate * (1 - rate) / runs + square / (4 * runs))
    low, high = ((rate + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if passed == 0 else low), (1.0 if passed == runs else high)
