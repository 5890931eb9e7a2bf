"""`precision.rounding`: one side's values are the other's, rounded to bf16 or fp16.

Formula: every value of the one side lies on the grid of the dtype, the other's do not, and each of these lies among the
numbers that rounding, to nearest or towards zero, makes the side's value of.  Share: of the squared difference, with what lies
outside of them left.  Two frameworks differ by noise before one of them rounds: a value next to the edge of its cell may be a
little outside, and rounding it would move it by a whole unit, so it is the distance that counts.

Source: a cast on the way (autocast, a bf16 optimizer state, an embedding scale in bf16: transformers #29402).  The side
that is rounded is named.  A side that *computes* in bf16 does not match: it differs by more than one rounding.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Float64, Sums
from differ.causes.grid import GRIDS, on_grid, outside
from differ.causes.records import Answer, Place, ask
from differ.result import Cause

ID: Final = "precision.rounding"

_MODES: Final = ("nearest", "toward_zero")


def find(context: Context) -> list[Cause]:
    """One cause for every row, side and dtype."""
    causes = []
    for group in ask(context, _question):
        side, dtype, mode = group.key
        verb = "is" if len(group.names) == 1 else "are"
        how = "" if mode == "nearest" else " towards zero"
        summary = f"{group.subject} {verb} rounded{how} to {dtype} in {side}"
        parameters = {"dtype": dtype, "mode": mode}
        causes.append(
            Cause(
                ID, summary, side, group.step, group.phase.label, tuple(group.names), parameters, group.sums.share
            )
        )  # fmt: skip
    return causes


def _question(_place: Place, a: Float64, b: Float64) -> Answer[tuple[str, str, str]] | None:
    for side, rounded, source in (("b", b, a), ("a", a, b)):
        for dtype in GRIDS:
            if not on_grid(rounded, dtype) or on_grid(source, dtype):
                continue
            for mode in _MODES:
                sums = Sums()
                left = outside(source, rounded, dtype, nearest=mode == "nearest")
                sums.add(rounded, source, rounded + left)
                if sums.share >= SHOWN:
                    return Answer((side, dtype, mode), sums)
    return None
