"""`loss.precision`: one side's loss was computed in bfloat16 or float16: every value of it lies on that grid.

    on the grid   round(l) = l in bfloat16 (8 significant bits) or float16 (11), for all losses of the side from the finding on
    undone        |l_a - l_b| less 4 units of the grid: what rounding on the way to a mean may cost

What bfloat16 holds float16 mostly holds too, so bfloat16 is tried first.  A float32 loss is on the bfloat16 grid by chance
once in 65,536, so this needs at least two values, and the other side off the grid.  Sources: Modalities #464, optax #1020.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from differ.causes.context import Context
from differ.causes.fit import Sums
from differ.causes.grid import on_grid
from differ.result import Cause
from tracer.dtypes import BFLOAT16, EPSILON
from tracer.schema import Phase

ID: Final = "loss.precision"

_UNITS: Final = 4.0
_AT_LEAST: Final = 2
# Values that are looked at, from the step of the finding on.
_MOST: Final = 64


def find(context: Context) -> list[Cause]:
    """At most one cause, for the first step with a finding in `loss`."""
    for step, _, _ in context.groups(Phase.LOSS):
        return _at(context, step)
    return []


def note(context: Context) -> list[Cause]:
    """The same of losses that are within tolerance, which in half precision hides it."""
    if context.findings_in(Phase.LOSS):
        return []
    steps = (step for step in context.steps() if step > 0 and context.micro_batches(Phase.LOSS, step))
    return [found for step in [next(steps, None)] if step is not None for found in _at(context, step)]


def _at(context: Context, step: int) -> list[Cause]:
    losses = {side: _losses(context, side, step) for side in "ab"}
    for dtype in (BFLOAT16, "float16"):
        for side, other in (("a", "b"), ("b", "a")):
            if _on_grid(losses[side], dtype) and losses[other] and not _on_grid(losses[other], dtype):
                return _tested(context, step, side, other, dtype)
    return []


def _losses(context: Context, side: str, first: int) -> list[float]:
    trace = context.trace(side)
    steps = (step for step in trace.steps if step >= first)
    rows = ((step, number) for step in steps for number in trace.micro_batches(Phase.LOSS, step))
    values = (
        context.scalar(side, Phase.LOSS, step, "loss", number)
        for (step, number), _ in zip(rows, range(_MOST), strict=False)
    )
    return [value for value in values if value is not None and math.isfinite(value) and value != 0.0]


def _on_grid(losses: list[float], dtype: str) -> bool:
    return len(losses) >= _AT_LEAST and on_grid(np.array(losses), dtype)


def _tested(context: Context, step: int, side: str, other: str, dtype: str) -> list[Cause]:
    sums = Sums()
    for number in context.micro_batches(Phase.LOSS, step):
        mine, theirs = (context.scalar(which, Phase.LOSS, step, "loss", number) for which in (side, other))
        if mine is None or theirs is None:
            continue
        unit = EPSILON[dtype] * 2.0 ** math.floor(math.log2(max(abs(theirs), 1e-30)))
        apart = abs(mine - theirs)
        sums += Sums(apart**2, max(0.0, apart - _UNITS * unit) ** 2)
    summary = f"{side} computes the loss in {dtype}: all its values lie on that grid, those of {other} do not"
    return [
        Cause(
            ID, summary, side=side, step=step, phase=Phase.LOSS.label, names=("loss",), parameters={"dtype": dtype},
            explains=sums.share,
        )
    ]  # fmt: skip
