"""`rng.dropout`: elements are dropped at random: others on each side, or on one side only.

Formulas, p the share of zeros: both sides drop   equal rates within five standard errors, the zeros of the one side are
independent of the other's (as many in common as chance makes), and what both keep agrees; one side drops   a is zero at p
of the places and b / (1 - p) elsewhere.  Share: of the squared difference, with what one side dropped put back.

Zeros that fill whole rows are none: unused tokens of an embedding look like that.

Source: generators of two frameworks, dropout left on or never applied (keys_values #43, peft #1178, aprender #2170).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Float64, RatioFit, Sums
from differ.causes.model_mode import mode_of
from differ.causes.records import Answer, Place, ask
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "rng.dropout"

PHASES: Final = (Phase.FORWARD, Phase.GRAD)
SMALLEST: Final = 64
LOWEST_RATE: Final = 0.005
CHANCE: Final = 5.0
# How near the factor on what is kept has to be to 1 / (1 - p), of which p is counted.
CLOSE: Final = 0.02

Bools = npt.NDArray[np.bool_]


def find(context: Context) -> list[Cause]:
    """One cause for every row with dropped elements, by which side drops."""
    causes = []
    for group in ask(context, _question, PHASES):
        side, rate = group.key, round(group.fitted, 3)
        percent = f"{100 * rate:.0f} %"
        if side is None:
            summary = f"{group.subject}: about {percent} of the elements are dropped on both sides, but other ones"
        else:
            other = "a" if side == "b" else "b"
            summary = f"{group.subject}: {side} drops about {percent} of the elements and scales the others; {other} drops none"
            summary += ", in evaluation mode" if mode_of(context, other, group.step) is False else ""
        parameters: dict[str, Any] = {"rate": rate}
        causes.append(
            Cause(ID, summary, side, group.step, group.phase.label, tuple(group.names), parameters, group.sums.share)
        )
    return causes


def _question(_place: Place, a: Float64, b: Float64) -> Answer[str | None] | None:
    if a.size < SMALLEST:
        return None
    zeros = a == 0.0, b == 0.0
    rates = [float(zero.mean()) for zero in zeros]
    if min(rates) >= LOWEST_RATE:
        return _both(a, b, zeros, rates)
    if rates[0] >= LOWEST_RATE and rates[1] < rates[0] / 10:
        return _one("a", a, b, zeros[0])
    if rates[1] >= LOWEST_RATE and rates[0] < rates[1] / 10:
        return _one("b", b, a, zeros[1])
    return None


def _both(a: Float64, b: Float64, zeros: tuple[Bools, Bools], rates: list[float]) -> Answer[str | None] | None:
    n, (p, q) = a.size, rates
    if max(p, q) > 1.0 - LOWEST_RATE or _whole_rows(zeros[0]) or _whole_rows(zeros[1]):
        return None
    if abs(p - q) > CHANCE * math.sqrt((p * (1 - p) + q * (1 - q)) / n):
        return None
    common, expected = float((zeros[0] & zeros[1]).sum()), n * p * q
    if abs(common - expected) > CHANCE * math.sqrt(max(expected, 1.0)):
        return None
    sums = Sums()
    sums.add(a, b, np.where(zeros[0] | zeros[1], a, b))
    return Answer(None, sums, (p + q) / 2) if sums.share >= SHOWN else None


def _one(side: str, dropped: Float64, whole: Float64, zero: Bools) -> Answer[str | None] | None:
    """The side that drops is `dropped`: whole / (1 - p) where it is not zero."""
    if _whole_rows(zero) or zero.all():
        return None
    fit = RatioFit()
    fit.add(whole[~zero], dropped[~zero])
    if not abs(fit.ratio * (1.0 - float(zero.mean())) - 1.0) <= CLOSE + CHANCE / math.sqrt(zero.size):
        return None
    if abs(fit.ratio - 1.0) < CLOSE / 10:
        return None
    sums = Sums()
    sums.add(dropped, whole, np.where(zero, 0.0, fit.ratio * whole))
    return Answer(side, sums, float(zero.mean())) if sums.share >= SHOWN else None


def _whole_rows(zero: Bools) -> bool:
    """Whether most zeros fill whole rows or whole columns."""
    if zero.ndim < 2:
        return False
    matrix = zero.reshape(-1, zero.shape[-1])
    total = matrix.sum()
    in_rows = matrix.all(axis=1).sum() * matrix.shape[1]
    in_columns = matrix.all(axis=0).sum() * matrix.shape[0]
    return bool(max(in_rows, in_columns) > total / 2)
