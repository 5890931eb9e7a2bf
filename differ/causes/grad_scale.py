"""`grad.scale`: the gradients of one side are one factor times those of the other, in the whole phase or in part of it.

    b = c a        c = sum ab / sum aa over all records of a set        undone: b / c against a

The factor is named where it equals a number of the run (micro-batches: transformers #35438, axolotl #2262; processes: pytorch
DistributedDataParallel averages; alpha / rank), see `constants.py`.  A negative factor is `sign`; one that the loss has
too is `loss.reduction`; one that is confined to `lora_B` while B is 0 is `lora.scale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from differ.causes.constants import name_factor, short
from differ.causes.context import Context
from differ.causes.fit import SHOWN, RatioFit
from differ.result import Cause
from tracer.schema import REPORTED_PREFIX, Phase

ID: Final = "grad.scale"

# Records belong to one set if their factors agree to this share of the deviation from 1, or to 5 standard errors.
_TOGETHER: Final = 0.02


@dataclass(slots=True)
class ScaledSet:
    """Records that one factor relates: their names and the fit over all of them."""

    names: list[str] = field(default_factory=list)
    fit: RatioFit = field(default_factory=RatioFit)

    def takes(self, one: RatioFit) -> bool:
        """Whether a record with that fit belongs to the set."""
        errors = 5.0 * sum(error for error in (one.error, self.fit.error) if math.isfinite(error))
        return abs(one.ratio - self.fit.ratio) <= _TOGETHER * abs(self.fit.ratio - 1.0) + errors


def find(context: Context) -> list[Cause]:
    """One cause for each factor in `grad`."""
    causes = []
    for step, _, _ in context.groups(Phase.GRAD):
        for scaled in scaled_sets(context, step):
            causes.append(_cause(context, step, scaled))
    return causes


def scaled_sets(context: Context, step: int) -> list[ScaledSet]:
    """The records with a finding at a step that differ by a positive factor, by factor; the largest records lead.

    Records that differ by the same factor and stay within their tolerance are members, and start no set.
    """
    fits = {name: _fit(context, step, name) for name in context.differing(Phase.GRAD, step)}
    known = {name: fit for name, fit in fits.items() if fit is not None and fit.ratio > 0.0 and fit.share >= SHOWN}
    suspects = set(context.suspects(Phase.GRAD, step))
    sets: list[ScaledSet] = []
    for name in sorted(known, key=lambda name: (name not in suspects, -known[name].aa, name)):
        home = next((one for one in sets if one.takes(known[name])), None)
        if home is None and name not in suspects:
            continue
        if home is None:
            sets.append(home := ScaledSet())
        home.names.append(name)
        home.fit += known[name]
    order = {name: i for i, name in enumerate(fits)}
    for one in sets:
        one.names.sort(key=order.__getitem__)
    return [one for one in sets if one.fit.share >= SHOWN]


def _fit(context: Context, step: int, name: str) -> RatioFit | None:
    both = None if name.startswith(REPORTED_PREFIX) else context.pair(Phase.GRAD, step, name)
    if both is None:
        return None
    fit = RatioFit()
    fit.add(*both)
    return fit if math.isfinite(fit.residual) and fit.aa > 0.0 else None


def _cause(context: Context, step: int, scaled: ScaledSet) -> Cause:
    total = sum(1 for name in context.names("a", Phase.GRAD, step) if not name.startswith(REPORTED_PREFIX))
    factor, error = scaled.fit.ratio, scaled.fit.error
    matches = name_factor(context, step, factor, error)
    big, small = ("b", "a") if factor > 1.0 else ("a", "b")
    times = max(factor, 1.0 / factor)
    where = "all gradients" if len(scaled.names) == total else f"{len(scaled.names):,} of {total:,} gradients"
    summary = f"{where} of {big} are {times:.6g} times those of {small}" + (f": {matches}" if matches else "")
    parameters = {"factor": short(factor), "matches": matches, "whole": len(scaled.names) == total}
    return Cause(
        ID, summary, step=step, phase=Phase.GRAD.label, names=tuple(scaled.names), parameters=parameters,
        explains=scaled.fit.share,
    )  # fmt: skip
