"""`precision.overflow`: inf or nan on one side, where the other is finite.

Formula: elements that are not finite on one side only are counted; where the other side's numbers at all infinities are
beyond the largest fp16 number (65504) that is said.  A difference that is not finite is larger than any finite rest, so the share
is 1.

Source: fp16 losses and gradients without loss scaling, updates without bias correction that grow until they overflow,
0 / 0 on an emptied mask (mlx-lm #1355).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from differ.causes.context import Context
from differ.causes.fit import Float64
from differ.causes.records import subject, suspects
from differ.causes.words import count
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "precision.overflow"

LARGEST_FP16: Final = 65504.0


@dataclass(slots=True)
class Odd:
    """Elements of one row that are not finite on one side only."""

    names: set[str] = field(default_factory=set)
    inf: int = 0
    nan: int = 0
    beyond: int = 0


def find(context: Context) -> list[Cause]:
    """One cause for every row with such elements, and side."""
    causes = []
    for step, phase, found in context.groups():
        odd = {f.name for f in found if f.kind == "nonfinite"}
        sides = {"a": Odd(), "b": Odd()}
        places = [
            place for place in suspects(context, step, phase, found) if place.name in odd or not _own(found, place.name)
        ]
        for place in places:
            pair = context.pair(phase, step, place.name, place.micro_batch)
            if odd and pair is not None:
                _count(sides["a"], place.name, pair[0], pair[1])
                _count(sides["b"], place.name, pair[1], pair[0])
        causes += [_cause(step, phase, side, seen, len(places)) for side, seen in sides.items() if seen.names]
    return causes


def _own(found: tuple[Any, ...], name: str) -> bool:
    """Whether a record has a finding of its own, of whatever kind."""
    return any(f.name == name for f in found)


def _count(odd: Odd, name: str, mine: Float64, other: Float64) -> None:
    here = ~np.isfinite(mine) & np.isfinite(other)
    if here.any():
        odd.names.add(name)
        odd.nan += int(np.isnan(mine[here]).sum())
        infinite = here & np.isinf(mine)
        odd.inf += int(infinite.sum())
        odd.beyond += int((np.abs(other[infinite]) > LARGEST_FP16).sum())


def _cause(step: int, phase: Phase, side: str, odd: Odd, asked: int) -> Cause:
    other = "a" if side == "b" else "b"
    words = " and ".join(f"{number:,} {word}" for number, word in ((odd.inf, "inf"), (odd.nan, "nan")) if number)
    names = tuple(sorted(odd.names))
    summary = f"{side} has {words} in {subject(names, phase, asked)}, where {other} is finite"
    parameters: dict[str, Any] = {"inf": odd.inf, "nan": odd.nan}
    if odd.inf and odd.beyond == odd.inf:
        summary += f"; {other} is beyond fp16's {LARGEST_FP16:.0f} there ({count(odd.inf, 'element')})"
        parameters["beyond"] = LARGEST_FP16
    return Cause(ID, summary, side, step, phase.label, names, parameters, 1.0)
