"""`optimizer.weight_decay`: decayed by another amount, by the gradient instead of the weight, not at all, or elsewhere.

    decoupled   w (1 - lr wd) - update             AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101
    coupled     g + wd w in place of g             Adam with L2, torch.optim.Adam(weight_decay=...), MLX SGD
    none        w - update
    supposed    wd = sum w (w - update - after) / (lr sum ww)      for a side that follows none with the recorded wd

Undone: each side replayed under its own rule, or with the fitted decay.  Confined to some parameters it is a filter that
names miss (transformers #35927).  A recorded wd that differs is found in `hparams`.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from differ.align import BLOCK
from differ.causes.constants import short
from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.causes.optimizers import settings_causes
from differ.causes.updates import (
    Inputs,
    between,
    followed,
    how_many,
    inputs_of,
    parameters_named,
    strays,
    supposed,
    with_hyper,
)
from differ.replay.optimizer import UpdateInputs, update_block
from differ.replay.rules.base import UNUSABLE, Rule
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "optimizer.weight_decay"

ASPECT: Final = "decay"
_WORDS: Final = {
    "decoupled": "decays the weights (decoupled)",
    "coupled": "adds the weight decay to the gradient (coupled)",
    "none": "applies no weight decay",
    "rate": "decays the weights by the scaled step size",
}


def find(context: Context) -> list[Cause]:
    """Causes from the settings, from the rules, and from sides that follow no rule."""
    causes = settings_causes(context, ID, ("weight_decay",), "weight decay")
    for step, phase, _ in context.groups(Phase.OPT_STATE, Phase.PARAM):
        causes += _between(context, step, phase)
        causes += _fitted(context, step) if phase is Phase.PARAM else []
    return causes


def _between(context: Context, step: int, phase: Phase) -> list[Cause]:
    """The two sides decay in different ways: one cause for each pair of ways."""
    groups = between(context, phase, step, ASPECT)
    if not groups:
        return []
    total = len(parameters_named(_concerned(context, phase, step), phase))
    return [_cause(context, step, phase, ways, group.names, group.sums, total) for ways, group in groups.items()]


def _cause(
    context: Context, step: int, phase: Phase, ways: tuple[str, str], names: list[str], sums: Sums, total: int
) -> Cause:
    found = parameters_named(names, phase)
    a, b = ways
    if phase is Phase.OPT_STATE:
        a, b = (
            way if way == "coupled" else _elsewhere(context, side, step, found)
            for side, way in zip("ab", ways, strict=True)
        )
    side = _odd(a, b)
    order = (("b", b), ("a", a)) if side == "b" else (("a", a), ("b", b))
    where = how_many(found, total)
    summary = f"{order[0][0]} {_WORDS[order[0][1]]}{where}; {order[1][0]} {_WORDS[order[1][1]]}"
    decay = {which: _decay(context, which, phase, step, names[0]) for which in "ab"}
    parameters = {"a": a, "b": b, "decay_a": decay["a"], "decay_b": decay["b"], "whole": not where}
    return Cause(
        ID, summary, side=side, step=step, phase=phase.label, names=found, parameters=parameters, explains=sums.share
    )  # fmt: skip


def _odd(a: str, b: str) -> str | None:
    """The side that does not do what AdamW does."""
    if "decoupled" in (a, b):
        return "a" if b == "decoupled" else "b"
    return "a" if a == "none" else "b"


def _elsewhere(context: Context, side: str, step: int, names: tuple[str, ...]) -> str:
    """How a side whose moments hold no decay treats its weights."""
    for name in names:
        inputs = inputs_of(context, side, Phase.PARAM, step, name)
        if inputs is None:
            continue
        rules = [how for how in inputs.rules if inputs.fit(how, context.policy.replay(inputs.after.dtype)).ok]
        ways = {dict(how)[ASPECT] for how in rules}
        if len(ways) == 1:
            return ways.pop()
    return "none"


def _decay(context: Context, side: str, phase: Phase, step: int, name: str) -> float | None:
    inputs = inputs_of(context, side, phase, step, name)
    return None if inputs is None else inputs.hyper.weight_decay


def _concerned(context: Context, phase: Phase, step: int) -> list[str]:
    """Tensors for which the way to decay makes a difference: their weights are not all zero."""
    return [
        one.name
        for one in followed(context, phase, step)
        if all(len({dict(how).get(ASPECT) for how in one.of(side)}) == 1 for side in "ab")
    ]


def _fitted(context: Context, step: int) -> list[Cause]:
    """A side that decays by another amount than it records, one amount for all tensors that it concerns."""
    causes = []
    for side, names in strays(context, Phase.PARAM, step):
        decays = {name: _estimate(context, side, step, name) for name in names}
        known = {name: decay for name, decay in decays.items() if decay is not None and math.isfinite(decay)}
        if not known:
            continue
        decay = short(float(np.median(list(known.values()))))
        sums, explained = Sums(), []
        for name in names:
            rules = _decoupled(context, side, step, name)
            one, follows = supposed(context, side, Phase.PARAM, step, name, with_hyper(weight_decay=decay), rules)
            if follows and one.share >= SHOWN:
                sums += one
                explained.append(name)
        if explained:
            recorded = _decay(context, side, Phase.PARAM, step, explained[0])
            summary = (
                f"{side} decays the weights by {decay:g}{how_many(explained, len(names))}; it records {recorded:g}"
            )
            causes.append(
                Cause(
                    ID, summary, side=side, step=step, phase=Phase.PARAM.label, names=tuple(explained),
                    parameters={"decay": decay, "recorded": recorded}, explains=sums.share,
                )
            )  # fmt: skip
    return causes


def _decoupled(context: Context, side: str, step: int, name: str) -> tuple[Rule, ...]:
    inputs = inputs_of(context, side, Phase.PARAM, step, name)
    return () if inputs is None else tuple(how for how in inputs.rules if dict(how)[ASPECT] == "decoupled")


def _estimate(context: Context, side: str, step: int, name: str) -> float | None:
    """Decay of one tensor by least squares, under the rule that leaves the least."""
    inputs = inputs_of(context, side, Phase.PARAM, step, name)
    if not isinstance(inputs, UpdateInputs) or inputs.hyper.lr == 0.0:
        return None
    best: tuple[float, float] | None = None
    for how in _decoupled(context, side, step, name):
        decay = _least_squares(inputs, how)
        if decay is None:
            continue
        changed: Inputs = with_hyper(weight_decay=decay)(inputs)
        residual = changed.fit(how, context.policy.replay(inputs.after.dtype)).residual2
        best = min(best or (math.inf, 0.0), (residual, decay))
    return None if best is None else best[1]


def _least_squares(inputs: UpdateInputs, how: Rule) -> float | None:
    top = bottom = 0.0
    try:
        for start in inputs.after.blocks():
            w, after = inputs.before.block(start, start + BLOCK), inputs.after.block(start, start + BLOCK)
            top += float(np.dot(w, w - update_block(inputs, how, start, w) - after))
            bottom += float(np.dot(w, w))
    except UNUSABLE:
        return None
    return top / (inputs.hyper.lr * bottom) if bottom > 0.0 and math.isfinite(top) else None
