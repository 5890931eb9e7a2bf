"""`forward.scale`, `forward.position`: a module's output is scaled, or is wrong from some position on or with position.

    scale      b = c a over the output of the first module that differs, c = sum ab / sum aa    undone: b / c
               named where c is bf16(sqrt(width)) / sqrt(width), an embedding scale (transformers #29402), or 1 / (1 - p)
    position   r_p = |b_p - a_p| / |a_p| at token position p, over all rows of the batch that were recorded there
               from     the difference is all at p >= k, k > 0     packing without position reset, trl #3526
               grows    r_p = c p by least squares                 an output that is itself turned by other angles
               undone   the positions from k on, or the line

Only where module outputs were recorded.  Later modules got their input from this one and are not looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.causes.constants import setting, short
from differ.causes.context import Context, Float64
from differ.causes.fit import SHOWN, RatioFit, explained_share
from differ.causes.grid import GRIDS, round_to
from differ.result import Cause, Finding
from tracer.dtypes import EPSILON
from tracer.schema import WHOLE_STEP, Phase

IDS: Final = ("forward.scale", "forward.position")

# A position counts as equal if its relative difference is below this many units in the last place.
_NOISE: Final = 64.0
# A difference that begins at a position is this many times what it is before; one that grows is not.
_JUMP: Final = 10.0
# A line through fewer positions says nothing.
_FEWEST: Final = 6


def find(context: Context) -> list[Cause]:
    """At most one cause of each kind, for the first module output with a finding."""
    findings = context.findings_in(Phase.FORWARD)
    if not findings or findings[0].name is None:
        return []
    first = findings[0]
    assert first.name is not None
    number = WHOLE_STEP if first.micro_batch is None else first.micro_batch
    both = context.pair(Phase.FORWARD, first.step, first.name, number)
    if both is None:
        return []
    dtypes = [context.dtype(side, Phase.FORWARD, first.step, first.name, number) or "" for side in "ab"]
    noise = _NOISE * max(EPSILON.get(dtype, 0.0) for dtype in dtypes)
    found = by_position(context, first, number, *both)
    return [*_scale(context, first, *both), *(_position(found, first, noise=noise) if found is not None else ())]


def _scale(context: Context, first: Finding, a: Float64, b: Float64) -> list[Cause]:
    fit = RatioFit()
    fit.add(a, b)
    if not fit.ratio > 0.0 or fit.share < SHOWN:
        return []
    matches = _known(context, fit, a.shape[-1] if a.ndim else 1)
    big, small = ("b", "a") if fit.ratio > 1.0 else ("a", "b")
    summary = f"{big}'s output of {first.name} is {max(fit.ratio, 1.0 / fit.ratio):.6g} times {small}'s"
    parameters = {"factor": short(fit.ratio), "matches": matches}
    return [_cause("forward.scale", summary + (f": {matches}" if matches else ""), first, parameters, fit.share)]


def _known(context: Context, fit: RatioFit, width: int) -> str:
    size = max(fit.ratio, 1.0 / fit.ratio)
    root = math.sqrt(width)
    for dtype in GRIDS:
        ratio = float(round_to(np.array([root]), dtype)[0]) / root
        if ratio != 1.0 and abs(size / max(ratio, 1.0 / ratio) - 1.0) <= 1e-6 + 5.0 * fit.error / fit.ratio:
            return f"the root of the width ({width}) rounded to {dtype}"
    for side in "ab":
        dropout = setting(context.trace(side), "lora.dropout")
        if dropout and dropout < 1.0 and abs(size * (1.0 - dropout) - 1.0) <= 1e-4:
            return f"1 / (1 - dropout {dropout:g})"
    return ""


@dataclass(frozen=True, slots=True)
class ByPosition:
    """Token positions that were recorded, ascending; squared difference and squared size of a at each, over the rows there."""

    positions: Float64
    apart2: Float64
    size2: Float64

    @property
    def relative(self) -> Float64:
        """|b - a| / |a| at each position."""
        found: Float64 = np.sqrt(self.apart2 / np.maximum(self.size2, np.finfo(np.float64).tiny))
        return found


def by_position(context: Context, first: Finding, number: int, a: Float64, b: Float64) -> ByPosition | None:
    """How far an output's two sides are apart at each position; None if its positions are not known."""
    recorded = context.positions(first.step, number)
    if recorded is None or a.ndim != 2 or len(recorded) != len(a):
        return None
    positions, at = np.unique(recorded[:, 1], return_inverse=True)
    apart2, size2 = (np.zeros(len(positions)) for _ in range(2))
    np.add.at(apart2, at, np.square(a - b).sum(axis=1))
    np.add.at(size2, at, np.square(a).sum(axis=1))
    return ByPosition(positions.astype(np.float64), apart2, size2)


def _position(found: ByPosition, first: Finding, *, noise: float) -> list[Cause]:
    positions, relative = found.positions, found.relative
    differs = np.flatnonzero(relative > noise)
    if differs.size == 0:
        return []
    start = int(differs[0])
    begins = start > 1 and relative[start] >= _JUMP * relative[:start].max()
    if begins and differs.size >= (positions.size - start) / 2:
        share = explained_share(float(found.apart2.sum()), float(found.apart2[:start].sum()))
        position = int(positions[start])
        summary = f"the output of {first.name} differs from position {position} on, and agrees before it"
        return [_cause("forward.position", summary, first, {"kind": "from", "position": position}, share)]
    return _growth(first, positions, relative)


def _growth(first: Finding, position: Float64, relative: Float64) -> list[Cause]:
    """A relative difference that is proportional to the position."""
    if relative.size < _FEWEST:
        return []
    slope = float(np.dot(position, relative) / np.dot(position, position))
    share = explained_share(float(np.dot(relative, relative)), float(np.square(relative - slope * position).sum()))
    # A constant difference is 3/4 of a line's, in squares: the line must do better than the mean by far.
    flat = float(np.square(relative - relative.mean()).sum())
    if share < SHOWN or float(np.square(relative - slope * position).sum()) > 0.1 * flat:
        return []
    summary = (
        f"the difference in the output of {first.name} grows with the position, {slope:.3g} of its size a position"
    )
    return [_cause("forward.position", summary, first, {"kind": "grows", "slope": float(f"{slope:.4g}")}, share)]


def _cause(cause_id: str, summary: str, first: Finding, parameters: dict[str, object], share: float) -> Cause:
    assert first.name is not None
    return Cause(
        cause_id, summary, step=first.step, phase=Phase.FORWARD.label, names=(first.name,), parameters=parameters, explains=share
    )  # fmt: skip
