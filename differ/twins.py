"""Which run a noise file is a twin of: known by its data, never by its name.

A file from another path, framework or dtype than either side is refused.  A twin starts within rounding of its run and trains
on its batches with its settings; a file that does not is left unused, and why is said, because a side that no longer starts or
trains as its twin did has changed in just the way that the comparison is there to find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from differ.align import Row, Rows
from differ.estimate import is_trainable, row_distance
from differ.inputs import LORA_SCALE, Inputs
from differ.runs import model_dtype
from tracer.dtypes import EPSILON
from tracer.errors import BadUsage
from tracer.reader import Trace
from tracer.schema import RNG_PREFIX, Phase
from tracer.sketch import FLOOR

# A twin starts this many rounding units away at most; of a frozen weight only the norm is known.
ROUNDING_UNITS: Final = 4.0
FROZEN_NORM: Final = 2e-2
HINT: Final = "record it with `trace record --twin`"
# What the twin is, and how it was computed: these may differ between a twin and its run.
_FREE: Final = ("twin", "compiled", "framework.version")


@dataclass(frozen=True, slots=True)
class TwinOf:
    """The run that a noise file is a twin of (both sides, where nothing tells them apart), or why it is none's."""

    sides: tuple[Rows, ...]
    reason: str = ""


def sides_of(twin: Rows, a: Rows, b: Rows) -> TwinOf:
    """What a noise file is a twin of.  Raises BadUsage for another path, framework or dtype than either side."""
    named = {"a": a, "b": b}
    kinds = {side: other_kind(twin.trace, rows.trace) for side, rows in named.items()}
    if all(kinds.values()):
        said = "; ".join(f"of {side}: {reason}" for side, reason in kinds.items())
        raise BadUsage(f"{twin.trace.path} is a twin of neither side ({said})", HINT)
    starts = {side: other_start(twin, named[side]) for side, kind in kinds.items() if not kind}
    fitting = [named[side] for side, reason in starts.items() if not reason]
    if not fitting:
        return TwinOf((), "; ".join(f"it is no twin of {side}, {reason}" for side, reason in starts.items()))
    near = {id(rows): (_other_settings(twin.trace, rows.trace), _start_distance(twin, rows)) for rows in fitting}
    best = min(near.values())
    return TwinOf(tuple(rows for rows in fitting if near[id(rows)] == best))


def other_kind(twin: Trace, side: Trace) -> str:
    """Why a noise file is not even the same kind of run; an empty string if it is."""
    for mine, theirs in ((twin.declared, side.declared), (twin.observed, side.observed)):
        for key in ("path", "framework"):
            if key in mine and key in theirs and mine[key] != theirs[key]:
                return f"its {key} is {mine[key]}, not {theirs[key]}"
    if model_dtype(twin) != model_dtype(side):
        return f"its model is {model_dtype(twin)}, not {model_dtype(side)}"
    return ""


def other_start(twin: Rows, side: Rows) -> str:
    """Why a noise file does not start within rounding of a run; an empty string if it does."""
    mine, theirs = twin.get(Phase.INIT, 0), side.get(Phase.INIT, 0)
    if mine is None or theirs is None:
        return "the state before training was not recorded"
    if _trained(mine) != _trained(theirs):
        return "other parameters are trained"
    for name in mine.positions:
        if name.startswith(RNG_PREFIX) or name not in theirs.positions or _same(mine, theirs, name):
            continue
        if name.endswith(LORA_SCALE) or mine.shape(name) != theirs.shape(name):
            return f"{name} is another one"
        if is_trainable(mine, name) and not _within_rounding(mine, theirs, name):
            return f"{name} starts further away than by rounding"
        if abs(mine.l2(name) - theirs.l2(name)) > FROZEN_NORM * max(mine.l2(name), theirs.l2(name)):
            return f"{name} is another weight"
    return ""


def other_course(twin: Rows, side: Rows, step: int) -> str:
    """Why a noise file is no twin at a step: fed another batch or trained with other settings; empty if it is one."""
    for phase in (Phase.HPARAMS, Phase.BATCH):
        for micro_batch in twin.trace.micro_batches(phase, step):
            mine, theirs = twin.get(phase, step, micro_batch), side.get(phase, step, micro_batch)
            if mine is None or theirs is None or mine.view.seal == theirs.view.seal:
                continue
            shared = [name for name in mine.positions if name in theirs.positions and not name.startswith(RNG_PREFIX)]
            other = next((name for name in shared if not _same(mine, theirs, name)), None)
            if other is not None:
                return f"{phase.label} {other} is another one at step {step} than in {side.trace.path.name}"
    return ""


def _trained(row: Row) -> set[str]:
    return {name for name in row.positions if is_trainable(row, name)}


def _same(a: Row, b: Row, name: str) -> bool:
    return bool(a.digest(name)) and a.digest(name) == b.digest(name)


def _within_rounding(a: Row, b: Row, name: str) -> bool:
    measured = row_distance(a, b, name)
    units = ROUNDING_UNITS * EPSILON.get(a.entry(name).dtype, 0.0)
    # Sketches see nothing below their own floor.
    return measured is not None and measured.rel_l2() <= max(units, FLOOR)


def _other_settings(twin: Trace, side: Trace) -> int:
    """How many settings differ that a twin shares with its run."""
    count = 0
    for mine, theirs in ((twin.declared, side.declared), (twin.observed, side.observed)):
        keys = {key for key in (*mine, *theirs) if not key.startswith(_FREE)}
        count += sum(mine.get(key) != theirs.get(key) for key in keys)
    return count


def _start_distance(twin: Rows, side: Rows) -> float:
    """Distance between the starting points, all trained parameters together."""
    start = Inputs(twin, side).before(1)
    return math.inf if start is None else math.hypot(*start.own.values()) if start.own else 0.0
