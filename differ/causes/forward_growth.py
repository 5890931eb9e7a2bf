"""A note, `forward.position`: the difference in an attention's output grows with the position, and nothing recorded can undo it.

    r_p   relative difference at token position p     none at the first position, which only looks at itself
    grows r_p ~ p^s: s the median over all pairs of positions of their slope in log r over log p, at least 0.65, and the
          ranks of r and p are correlated, at least 0.7

An output of attention is no linear function of its angles, so no line through r is the difference, and this is no cause.  On
outputs of small models other angles (a rate 0.1 % to 10 % off, tables in bfloat16 or float16) had s from 0.8 to 1.8, while
scaled scores, scaled projections and rounding stayed below 0.5; angles that are far off saturate and are not noted.  Not
looked for where a cause is found.  The angles themselves, where they were recorded, are `forward.rotary`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from differ.causes import forward, forward_rotary
from differ.causes.context import Context, Float64
from differ.result import Cause
from tracer.schema import WHOLE_STEP, Phase

ID: Final = "forward.position"

SLOPE: Final = 0.65
CORRELATION: Final = 0.7
# Of the median difference, what the first position may have.
AT_FIRST: Final = 0.1
FEWEST: Final = 8


def find(context: Context) -> list[Cause]:
    """At most one note, for the first module output with a finding."""
    findings = context.findings_in(Phase.FORWARD)
    if not findings or findings[0].name is None or forward.find(context) or forward_rotary.find(context):
        return []
    first = findings[0]
    number = WHOLE_STEP if first.micro_batch is None else first.micro_batch
    both = context.pair(Phase.FORWARD, first.step, first.name or "", number)
    found = None if both is None else forward.by_position(context, first, number, *both)
    slope = None if found is None else growth(found.positions, found.relative)
    if slope is None:
        return []
    summary = (
        f"the difference in the output of {first.name} grows with the position, about as its power {slope:.1f}, from none at "
        "the first: so do rotary angles that differ, which --modules '*rotary_emb' records in PyTorch"
    )
    parameters = {"kind": "grows", "power": round(slope, 2)}
    return [
        Cause(ID, summary, step=first.step, phase=Phase.FORWARD.label, names=(first.name or "",), parameters=parameters)
    ]


def growth(positions: Float64, relative: Float64) -> float | None:
    """The power of the position with which a relative difference grows; None if it does not, or is there from the first on."""
    later = (positions > 0.0) & (relative > 0.0)
    if later.sum() < FEWEST or positions[0] != 0.0 or relative[0] > AT_FIRST * float(np.median(relative)):
        return None
    x, y = np.log(positions[later]), np.log(relative[later])
    i, j = np.triu_indices(len(x), 1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    ranked = float(np.corrcoef(np.arange(len(x)), np.argsort(np.argsort(y)))[0, 1])
    return slope if slope >= SLOPE and ranked >= CORRELATION else None
