"""`layout.transpose`: a matrix is stored the other way round.

Formula: b = a^T, as the shapes allow; the share is that of the squared difference of the two sides read in order.

Source: frameworks that store a linear weight as [in, out] (Conv1D, MLX's LoRA factors) against [out, in]; a name rule that
transposes, or does not.  Nothing says which side is right.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.fit import Float64, Sums
from differ.causes.records import Answer, Place, found
from differ.result import Cause

ID: Final = "layout.transpose"


def find(context: Context) -> list[Cause]:
    """One cause for every row with transposed records."""
    return found(context, ID, _question, "transposed: b is a read column by column", any_shape=True)


def _question(_place: Place, a: Float64, b: Float64) -> Answer[None] | None:
    if a.ndim != 2 or min(a.shape) < 2 or a.shape != b.shape[::-1]:
        return None
    sums = Sums()
    sums.add(a, b, b.T)
    return Answer(None, sums)
