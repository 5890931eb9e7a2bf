"""`optimizer.bias_correction`: one side divides Adam's moments by 1 - beta^t, the other does not, or only one of the two.

    corrected     lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)        Kingma & Ba 2015, arXiv:1412.6980, algorithm 1
    uncorrected   lr m / (sqrt(v) + eps)                                    mlx.optimizers.Adam(bias_correction=False)
    ratio         uncorrected / corrected = (1 - b1^t) / sqrt(1 - b2^t)     3.162 at t = 1, 6.528 at 10, 1.26 at 1000
                  of Adamax 1 - b1^t                                        0.1 at t = 1

Undone: each side replayed under its own rule instead of the other's.  Half a correction is tested for a side that
follows no rule, with one beta supposed 0 in the correction.
"""

from __future__ import annotations

import math
from typing import Final

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.causes.updates import (
    between,
    followed,
    how_many,
    inputs_of,
    strays,
    supposed,
    with_hyper,
)
from differ.replay.rules.adam import RULES as ADAM_RULES
from differ.replay.rules.base import OPTIMIZER, Hyper
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "optimizer.bias_correction"

ASPECT: Final = "correction"
_CORRECTED: Final = tuple(how for how in ADAM_RULES if dict(how)[ASPECT] == "yes")


def find(context: Context) -> list[Cause]:
    """At most one cause a step for the rule, and one for half of it."""
    causes = []
    for step, phase, _ in context.groups(Phase.PARAM):
        causes += _between(context, step, phase)
        causes += _half(context, step, phase)
    return causes


def _between(context: Context, step: int, phase: Phase) -> list[Cause]:
    """One side corrects, the other does not."""
    groups = between(context, phase, step, ASPECT)
    if not groups:
        return []
    (ways, group), *_ = sorted(groups.items(), key=lambda item: -len(item[1].names))
    names, sums, without = group.names, group.sums, "a" if ways[0] == "no" else "b"
    hyper = _hyper(context, without, step, names)
    if hyper is None:
        return []
    families = {
        dict(how).get(OPTIMIZER) for one in followed(context, phase, step) if one.name in names for how in one.a
    }
    ratio = float(f"{_ratio(hyper, second=families != {'adamax'}):.5g}")
    where = how_many(names, _concerned(context, phase, step))
    other = "b" if without == "a" else "a"
    summary = f"{without} applies no bias correction{where} (updates {ratio:.4g} times as large); {other} does"
    parameters = {"ratio": ratio, "update": hyper.step, "beta1": hyper.beta1, "beta2": hyper.beta2}
    return [
        Cause(
            ID, summary, side=without, step=step, phase=phase.label, names=tuple(names), parameters=parameters,
            explains=sums.share,
        )
    ]  # fmt: skip


def _half(context: Context, step: int, phase: Phase) -> list[Cause]:
    """A side that corrects one moment only."""
    causes = []
    for side, names in strays(context, phase, step):
        for key, kept in (("beta1", "second"), ("beta2", "first")):
            sums, explained = Sums(), []
            for name in names:
                one, follows = supposed(context, side, phase, step, name, with_hyper(**{key: 0.0}), _CORRECTED)
                if follows and one.share >= SHOWN:
                    sums += one
                    explained.append(name)
            if explained:
                summary = f"{side} corrects the bias of the {kept} moment only{how_many(explained, len(names))}"
                causes.append(
                    Cause(
                        ID, summary, side=side, step=step, phase=phase.label, names=tuple(explained),
                        parameters={"corrects": kept}, explains=sums.share,
                    )
                )  # fmt: skip
    return causes


def _hyper(context: Context, side: str, step: int, names: list[str]) -> Hyper | None:
    inputs = inputs_of(context, side, Phase.PARAM, step, names[0]) if names else None
    return None if inputs is None else inputs.hyper


def _ratio(hyper: Hyper, *, second: bool) -> float:
    """Uncorrected over corrected update, eps aside; Adamax has no `second` moment to correct."""
    if not second:
        return 1.0 - hyper.beta1**hyper.step
    second_moment = 1.0 - hyper.beta2**hyper.step
    return (1.0 - hyper.beta1**hyper.step) / math.sqrt(second_moment) if second_moment > 0.0 else math.inf


def _concerned(context: Context, phase: Phase, step: int) -> int:
    """Tensors that differ in bits and for which the aspect makes a difference at all: their rules name one choice of it."""
    return sum(
        1
        for one in followed(context, phase, step)
        if all(len({dict(how).get(ASPECT) for how in one.of(side)}) == 1 for side in "ab")
    )
