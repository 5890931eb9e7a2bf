"""`sign`: one side is the negative of the other.

Formula: b = -a: the least-squares ratio is -1 to a thousandth, and what is left of a + b explains the share.

Source: a loss that is maximised, a residual with its terms exchanged, a gradient added instead of subtracted.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.fit import Float64, RatioFit, Sums
from differ.causes.records import Answer, Place, found
from differ.result import Cause

ID: Final = "sign"

CLOSE: Final = 1e-3


def find(context: Context) -> list[Cause]:
    """One cause for every row with negated records."""
    return found(context, ID, _question, "negated: b is -a")


def _question(_place: Place, a: Float64, b: Float64) -> Answer[None] | None:
    fit = RatioFit()
    fit.add(a, b)
    if not (fit.bb > 0.0 and abs(fit.ratio + 1.0) <= CLOSE):
        return None
    sums = Sums()
    sums.add(a, b, -b)
    return Answer(None, sums)
