"""Which reduction a trace follows, read off the numbers.

With S_m the summed cross-entropy of micro-batch m over its n_m supervised tokens, K micro-batches and N = sum of n_m:

    a loss is          S_m / n_m (mean)        S_m / (n_m K)            S_m / N               S_m (sum)
    a gradient is      sum of grad S_m times   1 / (n_m K)              1 / N                 1 / n_m         1

The order is that of preference where several are the same number, as with one micro-batch.  Pure functions; the one that is
nearest in the middle of the run is the run's, so that a fault at one step does not choose it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

# Reduction -> what it is in words, in order of preference.
LOSS_RULES: Final = {
    "mean": "mean over each micro-batch's tokens",
    "1/K": "mean over each micro-batch's tokens, divided by the number of micro-batches",
    "n/N": "sum over each micro-batch's tokens, divided by all tokens of the step",
    "sum": "sum over each micro-batch's tokens",
}
GRAD_RULES: Final = {
    "mean of means": "mean of the micro-batches' token means",
    "token-weighted": "mean over all tokens of the step",
    "sum of means": "sum of the micro-batches' token means",
    "sum": "sum over all tokens of the step",
}
# Errors below this are all exact: none of them is nearer than another.
_EXACT: Final = 1e-12
# Another reduction is chosen over a preferred one only where it is that much nearer.
_NEARER: Final = 0.5


def loss_weights(rule: str, tokens: Sequence[int]) -> list[float]:
    """What each micro-batch's token mean is multiplied by in its loss."""
    total, count = sum(tokens), len(tokens)
    each = {"mean": 1.0, "1/K": 1.0 / count}
    return [each[rule]] * count if rule in each else [n / total if rule == "n/N" else float(n) for n in tokens]


def grad_weights(rule: str, tokens: Sequence[int]) -> list[float]:
    """What each micro-batch's token mean counts in the accumulated gradient."""
    total, count = sum(tokens), len(tokens)
    each = {"mean of means": 1.0 / count, "sum of means": 1.0}
    if rule in each:
        return [each[rule]] * count
    return [n / total if rule == "token-weighted" else float(n) for n in tokens]


def loss_error(recorded: float, mean: float, weight: float) -> float:
    """Relative error of a loss once its weight is undone, against at least 1; inf where one side only is not finite."""
    if not math.isfinite(recorded) or not math.isfinite(mean) or weight == 0.0:
        alike = recorded == mean or (math.isnan(recorded) and math.isnan(mean))
        return 0.0 if alike else math.inf
    value = recorded / weight
    return abs(value - mean) / max(abs(value), abs(mean), 1.0)


def chosen(errors: Mapping[str, Sequence[float]]) -> str:
    """The rule of a run, given each rule's error at every step: the nearest in the middle, the preferred one of equals."""
    middle = {rule: _middle(each) for rule, each in errors.items()}
    best = min(middle.values())
    limit = max(best / _NEARER, _EXACT) if math.isfinite(best) else math.inf
    return next(rule for rule, error in middle.items() if error <= limit)


def _middle(errors: Sequence[float]) -> float:
    return statistics.median(math.inf if math.isnan(error) else error for error in errors) if errors else 0.0


def fitted(recorded: Sequence[float], reference: Sequence[float]) -> float | None:
    """The one factor between two series of numbers, or None where the ratios differ by more than a thousandth."""
    ratios = [a / b for a, b in zip(recorded, reference, strict=True) if b != 0.0 and math.isfinite(a / b)]
    if not ratios or len(ratios) < len(recorded):
        return None
    middle = statistics.median(ratios)
    return middle if all(abs(ratio - middle) <= 1e-3 * abs(middle) for ratio in ratios) else None
