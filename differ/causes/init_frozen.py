"""`init.frozen`: frozen base weights differ: which ones; or all of them, by a cast.

The file holds a frozen weight's digest and statistics, not its values, so the statistics are what is tested:

    cast       dtype differs, or min and max of one side are the other's rounded to bf16 or fp16, in every weight
    factor     min, max and mean of b are those of a times one constant
    reordered  norm, min, max and number of zeros agree: the same numbers in other places, or another layout

Share: of the squared difference of the minima and maxima; a weight whose digest differs and nothing else is known of is
named without one.

Source: `dtype="float16"` forced on a bf16 checkpoint, or another checkpoint.  The side of a cast is the coarser one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from differ.align import Row
from differ.causes.context import Context
from differ.causes.fit import Float64, Sums
from differ.causes.grid import GRIDS, round_to
from differ.causes.words import count, listed, number
from differ.result import Cause
from tracer.dtypes import EPSILON, coarser
from tracer.schema import STATS, Phase

ID: Final = "init.frozen"

_L2, _MIN, _MAX, _MEAN, _ZEROS = (STATS.index(name) for name in ("l2", "min", "max", "mean", "zeros"))
# Statistics that are sums are rounded by the order of summation.
CLOSE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Weight:
    """One frozen weight: dtype and statistics of both sides."""

    name: str
    dtypes: tuple[str, str]
    a: Float64
    b: Float64

    def extremes(self, side: str) -> Float64:
        """min and max of a side."""
        return (self.a if side == "a" else self.b)[[_MIN, _MAX]]


def find(context: Context) -> list[Cause]:
    """One cause for every cast, and one for the weights that differ otherwise."""
    a, b = context.row("a", Phase.INIT, 0), context.row("b", Phase.INIT, 0)
    if a is None or b is None:
        return []
    kinds = ("value", "shape", "nonfinite")
    names = [f.name for f in context.findings_in(Phase.INIT) if f.name is not None and f.kind in kinds]
    weights = [_weight(a, b, name) for name in names if _frozen(a, name) and _frozen(b, name)]
    groups: dict[tuple[str, str] | None, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(_cast(weight), []).append(weight)
    frozen = sum(_frozen(a, name) for name in a.positions)
    return [_other(found) if cast is None else _casts(cast, found, frozen) for cast, found in groups.items()]


def _frozen(row: Row, name: str) -> bool:
    """Whether a record is a weight that is not trained: neither its values nor, in a fingerprint, a sketch are kept."""
    return name in row.positions and not row.entry(name).dataset and not row.entry(name).alias_of


def _weight(a: Row, b: Row, name: str) -> Weight:
    stats = [row.view.stats[row.positions[name]] for row in (a, b)]
    return Weight(name, (a.entry(name).dtype, b.entry(name).dtype), *stats)


def _cast(weight: Weight) -> tuple[str, str] | None:
    """Side and dtype of a cast that gives this weight's extremes, norm and mean; None if none does.

    Equal numbers in bfloat16 and float16 lie on the coarser grid, so it is the finer side that was cast.
    """
    if set(weight.dtypes) == set(GRIDS) and np.array_equal(weight.extremes("a"), weight.extremes("b")):
        finer = min("ab", key=lambda side: EPSILON[weight.dtypes["ab".index(side)]])
        return finer, weight.dtypes["ab".index(finer)]
    for side, other in (("b", "a"), ("a", "b")):
        mine, theirs = (weight.dtypes[1], weight.dtypes[0]) if side == "b" else weight.dtypes
        if mine in GRIDS and mine != theirs and coarser(mine, theirs) == mine:
            grids: tuple[str, ...] = (mine,)
        elif mine == theirs and mine not in GRIDS:
            grids = GRIDS
        else:
            continue
        for grid in grids:
            source, rounded = weight.extremes(other), weight.extremes(side)
            moved = mine != theirs or not np.array_equal(source, rounded)
            if moved and np.array_equal(round_to(source, grid), rounded) and _near(weight, EPSILON[grid]):
                return side, grid
    return None


def _near(weight: Weight, epsilon: float) -> bool:
    """Whether the norms differ by no more than rounding can make."""
    return bool(abs(weight.a[_L2] - weight.b[_L2]) <= epsilon * max(weight.a[_L2], weight.b[_L2]))


def _casts(cast: tuple[str, str], weights: list[Weight], frozen: int) -> Cause:
    side, dtype = cast
    sums = Sums()
    for weight in weights:
        source, rounded = weight.extremes("a" if side == "b" else "b"), weight.extremes(side)
        sums.add(rounded, source, round_to(source, dtype))
    names = tuple(sorted(weight.name for weight in weights))
    what = f"all {len(names):,} frozen weights" if len(names) == frozen > 1 else _which(names)
    summary = f"{side} has {what} cast to {dtype}"
    # Extremes that are representable anyway show no difference: there is nothing to take a share of.
    share = sums.share if sums.difference > 0.0 else None
    return _cause(names, summary, {"cast": dtype}, side, share)


def _other(weights: list[Weight]) -> Cause:
    names = tuple(sorted(weight.name for weight in weights))
    ratios = [_ratio(weight) for weight in weights]
    ratio = ratios[0]
    if ratio is not None and all(other is not None and abs(other / ratio - 1.0) <= CLOSE for other in ratios):
        sums = Sums()
        for weight in weights:
            sums.add(weight.extremes("b"), weight.extremes("a"), weight.extremes("a") * ratio)
        return _cause(
            names, f"frozen {_which(names)}: b is {number(ratio)} times a", {"ratio": ratio}, None, sums.share
        )
    if all(_reordered(weight) for weight in weights):
        summary = f"frozen {_which(names)}: the same numbers on both sides, in other places"
        return _cause(names, summary, {"same_numbers": True}, None, None)
    verb = "differs" if len(names) == 1 else "differ"
    return _cause(names, f"frozen {_which(names)} {verb} from the start", {}, None, None)


def _ratio(weight: Weight) -> float | None:
    """c, if min, max and mean of b are c times those of a (min and max exchanged where c is negative)."""
    size = max(abs(weight.a[_MIN]), abs(weight.a[_MAX]))
    ratio = math.copysign(weight.b[_L2] / weight.a[_L2], 1.0) if weight.a[_L2] > 0.0 else math.nan
    for c in (ratio, -ratio):
        low, high = sorted((c * weight.a[_MIN], c * weight.a[_MAX]))
        apart = max(abs(low - weight.b[_MIN]), abs(high - weight.b[_MAX]), abs(c * weight.a[_MEAN] - weight.b[_MEAN]))
        if apart <= CLOSE * abs(c) * size and abs(c - 1.0) > CLOSE:
            return float(c)
    return None


def _reordered(weight: Weight) -> bool:
    exact = all(weight.a[i] == weight.b[i] for i in (_MIN, _MAX, _ZEROS))
    return (
        exact and abs(weight.a[_L2] - weight.b[_L2]) <= CLOSE * weight.a[_L2] and weight.dtypes[0] == weight.dtypes[1]
    )


def _which(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{count(len(names), 'weight')} ({listed(names, 2)})"


def _cause(
    names: tuple[str, ...], summary: str, parameters: dict[str, Any], side: str | None, share: float | None
) -> Cause:
    return Cause(ID, summary, side, 0, Phase.INIT.label, names, parameters, share)
