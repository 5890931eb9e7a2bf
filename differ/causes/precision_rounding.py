"""`precision.rounding`: one side's values are the other's, rounded to bf16 or fp16.

Formula: every value of the one side lies on the grid of the dtype, the other's do not, and round(other) gives the side's
values, to nearest even or towards zero.  Share: of the squared difference, with the other side rounded too.

Source: a cast on the way (autocast, a bf16 optimizer state, an embedding scale in bf16: transformers #29402).  The side
that is rounded is named.  A side that *computes* in bf16 does not match: it differs by more than one rounding.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Float64, Sums
from differ.causes.grid import GRIDS, on_grid, round_to, truncate_to
from differ.causes.records import Answer, Place, ask
from differ.result import Cause

ID: Final = "precision.rounding"

_MODES: Final = {"nearest": round_to, "toward_zero": truncate_to}


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
            for mode, apply in _MODES.items():
                sums = Sums()
                sums.add(rounded, source, apply(source, dtype))
                if sums.share >= SHOWN:
                    return Answer((side, dtype, mode), sums)
    return None
