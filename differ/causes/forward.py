"""`forward.scale`, `forward.position`: a module's output is scaled, or is wrong from some position on or with position.

    scale      b = c a over the output of the first module that differs, c = sum ab / sum aa    undone: b / c
               named where c is bf16(sqrt(width)) / sqrt(width), an embedding scale (transformers #29402), or 1 / (1 - p)
    position   r_p = |b_p - a_p| / |a_p| at token position p, over all rows of the batch that were recorded there
               from     the difference is all at p >= k, k > 0     packing without position reset, trl #3526
               grows    r_p = c p by least squares                 rotary phases in low precision, transformers #29285
               undone   the positions from k on, or the line

Only where module outputs were recorded.  Later modules got their input from this one and are not looked at.
"""

from __future__ import annotations

import math
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
    return [*_scale(context, first, *both), *_position(context, first, number, *both, noise=noise)]


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


def _position(context: Context, first: Finding, number: int, a: Float64, b: Float64, *, noise: float) -> list[Cause]:
    recorded = context.positions(first.step, number)
    if recorded is None or a.ndim != 2 or len(recorded) != len(a):
        return []
    # Token positions that were recorded, ascending, and which of them each row is at.
    positions, at = np.unique(recorded[:, 1], return_inverse=True)
    apart2, size2 = (np.bincount(at, np.square(values).sum(axis=1)) for values in (a - b, a))
    relative = np.sqrt(apart2 / np.maximum(size2, np.finfo(np.float64).tiny))
    differs = np.flatnonzero(relative > noise)
    if differs.size == 0:
        return []
    start = int(differs[0])
    if start > 1 and differs.size >= (positions.size - start) / 2:
        share = explained_share(float(apart2.sum()), float(apart2[:start].sum()))
        summary = f"the output of {first.name} differs from position {positions[start]} on, and agrees before it"
        return [_cause("forward.position", summary, first, {"kind": "from", "position": int(positions[start])}, share)]
    return _growth(first, positions.astype(np.float64), relative)


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
