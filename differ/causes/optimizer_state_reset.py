"""`optimizer.state_reset`: a side's moments at step k follow from zeros, not from those of step k - 1: the state was lost.

    kept    m = b1 m' + (1 - b1) g
    reset   m =         (1 - b1) g          likewise v and a momentum buffer; the update counter may start again at 1

as after a resume that saved no optimizer, or an optimizer made anew (torchtitan #1213, accelerate #4283).  Undone: the
moments replayed from zeros.  At the first update there is no state to lose.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from differ.align import Tensor
from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.causes.updates import Inputs, how_many, parameters_named, strays, supposed
from differ.replay.optimizer import MomentInputs
from differ.replay.rules.adam import MOMENT_RULES
from differ.replay.rules.sgd import MOMENTUM_RULES
from differ.result import Cause, Finding
from tracer.names import split_state_name
from tracer.schema import Phase

ID: Final = "optimizer.state_reset"


def find(context: Context) -> list[Cause]:
    """At most one cause for each side and step."""
    causes = []
    for step, _, found in context.groups(Phase.OPT_STATE):
        for side, names in strays(context, Phase.OPT_STATE, step):
            causes += _tested(context, side, step, names, found)
    return causes


def _tested(context: Context, side: str, step: int, names: list[str], found: tuple[Finding, ...]) -> list[Cause]:
    sums, explained = Sums(), []
    for name in names:
        one, follows = supposed(
            context, side, Phase.OPT_STATE, step, name, _from_zeros, (*MOMENT_RULES, *MOMENTUM_RULES)
        )
        if follows and one.share >= SHOWN:
            sums += one
            explained.append(name)
    if not explained:
        return []
    parameters = parameters_named(explained, Phase.OPT_STATE)
    every = parameters_named(
        [n for n in context.differing(Phase.OPT_STATE, step) if split_state_name(n)[0]], Phase.OPT_STATE
    )
    counters = tuple(f.name for f in found if f.name is not None and _starts_again(context, side, step, f.name))
    counted = " and counts from 1 again" if counters else ""
    summary = f"{side} lost its optimizer state at step {step}{how_many(parameters, len(every))}: it follows from zeros{counted}"
    kinds = sorted({split_state_name(name)[1] for name in explained})
    return [
        Cause(
            ID, summary, side=side, step=step, phase=Phase.OPT_STATE.label, names=(*parameters, *counters),
            parameters={"kinds": kinds, "counter": bool(counters)}, explains=sums.share,
        )
    ]  # fmt: skip


def _from_zeros(inputs: Inputs) -> Inputs:
    assert isinstance(inputs, MomentInputs)
    return replace(inputs, before=Tensor.zeros(inputs.after.shape, inputs.after.dtype))


def _starts_again(context: Context, side: str, step: int, name: str) -> bool:
    """Whether a counter with a finding is smaller on this side: `step`, or one a parameter."""
    if name.rpartition("/")[2] != "step":
        return False
    mine, other = (context.scalar(which, Phase.OPT_STATE, step, name) for which in (side, "b" if side == "a" else "a"))
    return mine is not None and other is not None and mine < other
