"""`param.not_updated`: a parameter is what it was before the update, though its own state, gradient and settings change it.

    due     u = w (1 - d) - w'      w' the replay under the rule that the other side follows, d its decoupled decay
    kept    w' = w                  nothing was written
            w' = w (1 - d)          the decay was, the rest of the update was not
    applied sum (kept - w') u / sum u u, the share of the update that arrived: 0

`kept` holds element by element, within what rounding may cost.  Undone: the update carried out, sum |w' - replay|^2 against
sum |w' - kept|^2, each side from its own recorded inputs, so nothing that happened before is part of it.  Both sides must have
recorded what the replay needs; an update that rounding would swallow is no finding in the first place.

Source: an in-place kernel that writes into a temporary where a tensor is not contiguous (pytorch #118115, #118117); a step of
the optimizer that is skipped while its state advances; a parameter that was exchanged for a copy after the optimizer was built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from differ.align import BLOCK
from differ.causes.context import Context, Float64
from differ.causes.fit import SHOWN, Sums, squared
from differ.causes.updates import apart, fit, inputs_of, tolerance_of
from differ.causes.words import number
from differ.replay.fit import SMALLEST_NORMAL, Fit
from differ.replay.optimizer import UpdateInputs
from differ.replay.rules import family_of
from differ.replay.rules.base import UNUSABLE, Rule
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "param.not_updated"


@dataclass(slots=True)
class _Lost:
    """Parameters of one side whose update is missing: sums over them, with `decayed` the decay was applied."""

    names: list[str] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    arrived: float = 0.0
    due2: float = 0.0
    decayed: bool = False

    def __iadd__(self, other: _Lost) -> _Lost:
        self.names += other.names
        self.sums += other.sums
        self.arrived += other.arrived
        self.due2 += other.due2
        return self


def find(context: Context) -> list[Cause]:
    """At most one cause for each step, side and form."""
    causes = []
    for step, _, _ in context.groups(Phase.PARAM):
        groups: dict[tuple[str, bool], _Lost] = {}
        for one in apart(context, Phase.PARAM, step):
            side = one.stray
            if side is None:
                continue
            lost = _lost(context, side, step, one.name, one.of("a" if side == "b" else "b"))
            if lost is not None:
                group = groups.setdefault((side, lost.decayed), _Lost(decayed=lost.decayed))
                group += lost
        causes += [_cause(context, step, side, group) for (side, _), group in groups.items()]
    return causes


def _lost(context: Context, side: str, step: int, name: str, followed: tuple[Rule, ...]) -> _Lost | None:
    """What is missing of one parameter's update under the rule of the other side; None if it is another fault."""
    inputs = inputs_of(context, side, Phase.PARAM, step, name)
    usable = [] if inputs is None else [how for how in followed if how in inputs.rules]
    if not isinstance(inputs, UpdateInputs) or not usable:
        return None
    how = min(usable, key=lambda how: fit(context, inputs, how).residual2)
    forms = [_form(context, inputs, how, name, decayed=decayed) for decayed in (False, True)]
    found = [form for form in forms if form is not None and form.sums.share >= SHOWN]
    return min(found, key=lambda form: form.sums.residual) if found else None


def _form(context: Context, inputs: UpdateInputs, how: Rule, name: str, *, decayed: bool) -> _Lost | None:
    """The parameter as it would be without its update, held against what was recorded."""
    family, choices, tolerance = family_of(how), dict(how), tolerance_of(context, inputs)
    floor = SMALLEST_NORMAL.get(inputs.after.dtype, 0.0)
    held, lost = Fit(tolerance.spike), _Lost([name], decayed=decayed)
    try:
        decay = family.decay(inputs, choices)
        if decayed and decay == 0.0:
            return None
        for start in inputs.after.blocks():
            w, after = (values.block(start, start + BLOCK) for values in (inputs.before, inputs.after))
            due: Float64 = family.update(inputs, choices, start, w)
            kept = w * (1.0 - decay) if decayed else w
            held.add(start, after, kept, tolerance.ulp * tolerance.eps * np.abs(w) + floor)
            lost.sums += Sums(squared(after - (w * (1.0 - decay) - due)), squared(after - kept))
            lost.arrived += float(np.dot(kept - after, due))
            lost.due2 += squared(due)
    except UNUSABLE:
        return None
    return lost if held.ok and lost.due2 > 0.0 else None


def _cause(context: Context, step: int, side: str, lost: _Lost) -> Cause:
    total = len(context.names(side, Phase.PARAM, step))
    subject = lost.names[0] if len(lost.names) == 1 else f"{len(lost.names):,} of {total:,} parameters"
    due, applied = math.sqrt(lost.due2), round(lost.arrived / lost.due2, 6) + 0.0
    but = " but for the weight decay" if lost.decayed else ""
    summary = (
        f"{side} does not update {subject}{but}: {number(100.0 * applied)} % is there of the update that its own state and "
        f"settings give (norm {number(due, 3)}); {'a' if side == 'b' else 'b'} has its update"
    )
    parameters: dict[str, Any] = {"applied": applied, "due": float(f"{due:.4g}"), "decayed": lost.decayed}
    return Cause(
        ID, summary, side=side, step=step, phase=Phase.PARAM.label, names=tuple(lost.names), parameters=parameters,
        explains=lost.sums.share,
    )  # fmt: skip
