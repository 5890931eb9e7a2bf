"""`corrupt.elements`: a handful of elements differ, all others of the record agree to the bit.

Formula: at most 16 elements of a record, and at most one in eight, are unequal.  The share is that of the squared
difference, with those elements put back: 1, unless nan or inf is among them, which is `precision.overflow`'s.

Source: broken memory, a race, an index that is off, an in-place edit.  Which side is wrong can be told where the
phase is replayed and one side follows from its own inputs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from differ.causes.context import Context
from differ.causes.fit import Float64, Sums
from differ.causes.records import TENSORS, Answer, Group, Place, ask
from differ.causes.words import count, number
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "corrupt.elements"

MOST: Final = 16
ONE_IN: Final = 8

# Micro-batch, name, size, places, and both sides' values there.
Key = tuple[int, str, int, tuple[tuple[int, ...], ...], tuple[float, ...], tuple[float, ...]]


def find(context: Context) -> list[Cause]:
    """One cause for every such record."""
    return [_cause(context, group) for group in ask(context, _question, (*TENSORS, Phase.BATCH))]


def _question(place: Place, a: Float64, b: Float64) -> Answer[Key] | None:
    unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
    found = int(unequal.sum())
    if not 0 < found <= min(MOST, a.size // ONE_IN):
        return None
    sums = Sums()
    sums.add(a, b, np.where(unequal, a, b))
    # Places and values are of one record, so each has a cause of its own.
    places = tuple(tuple(int(i) for i in at) for at in np.argwhere(unequal))
    return Answer((place.micro_batch, place.name, a.size, places, tuple(a[unequal]), tuple(b[unequal])), sums)


def _cause(context: Context, group: Group[Key]) -> Cause:
    _, name, size, places, a, b = group.key
    shown = f" at {list(places[0])} (a {number(a[0], 9)}, b {number(b[0], 9)})" if len(places) == 1 else ""
    verb = "differs" if len(places) == 1 else "differ"
    summary = f"{count(len(places), 'element')} of {size:,} {verb} in {name}{shown}; the rest agrees to the bit"
    parameters: dict[str, Any] = {
        "elements": len(places), "of": size, "at": [list(at) for at in places],
        "a": [float(x) for x in a], "b": [float(x) for x in b],
    }  # fmt: skip
    names = tuple(group.names)
    side = context.odd_side(group.phase, group.step)
    return Cause(ID, summary, side, group.step, group.phase.label, names, parameters, group.sums.share)
