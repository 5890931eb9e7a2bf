"""`optimizer.betas`: a moment decays at another rate than recorded, or than the other side's.

    m = b1 m' + (1 - b1) g        b1 = sum (m - g)(m' - g) / sum (m' - g)^2          Kingma & Ba 2015, arXiv:1412.6980
    v = b2 v' + (1 - b2) g^2      b2 likewise, with g^2

fitted over all tensors of one kind of moment that do not follow from their own inputs with the recorded betas.  Undone: the
moments replayed with the fitted beta, and the update with the same one in its correction.  Recorded betas that differ are
found in `hparams`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from differ.align import BLOCK
from differ.causes.constants import short
from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.causes.optimizers import settings_causes
from differ.causes.updates import (
    apart,
    inputs_of,
    parameters_named,
    strays,
    supposed,
    with_hyper,
)
from differ.replay.optimizer import MomentInputs
from differ.replay.rules.adam import FIRST_MOMENT, MOMENT_RULES, SECOND_MOMENT
from differ.replay.rules.adam import RULES as ADAM_RULES
from differ.result import Cause
from tracer.names import split_state_name
from tracer.schema import Phase

ID: Final = "optimizer.betas"

_CORRECTED: Final = tuple(how for how in ADAM_RULES if dict(how)["correction"] == "yes")
_KINDS: Final = ((FIRST_MOMENT, "beta1"), (SECOND_MOMENT, "beta2"))


def find(context: Context) -> list[Cause]:
    """Causes from the settings, and one for each beta of a side whose moments do not follow."""
    causes = settings_causes(context, ID, ("beta1", "beta2"), "moment decay")
    for step, phase, _ in context.groups(Phase.OPT_STATE, Phase.PARAM):
        if phase is Phase.OPT_STATE:
            for side, names in strays(context, phase, step):
                causes += _moments(context, side, step, names)
        else:
            # With other betas than recorded a corrected update can look like an uncorrected one, so not strays only.
            for side, names in strays(context, Phase.OPT_STATE, step):
                owners = set(parameters_named(names, Phase.OPT_STATE))
                mine = [one.name for one in apart(context, phase, step) if one.name in owners]
                causes += _update(context, side, step, mine)
    return causes


def _moments(context: Context, side: str, step: int, names: list[str]) -> list[Cause]:
    causes = []
    for kind, key in _KINDS:
        mine = [name for name in names if split_state_name(name)[1] == kind]
        beta = _fit_beta(context, side, step, mine)
        if beta is None:
            continue
        sums, explained = Sums(), []
        for name in mine:
            one, follows = supposed(context, side, Phase.OPT_STATE, step, name, with_hyper(**{key: beta}), MOMENT_RULES)
            if follows and one.share >= SHOWN:
                sums += one
                explained.append(name)
        if explained:
            causes.append(_cause(context, side, step, Phase.OPT_STATE, explained, {key: beta}, sums))
    return causes


def _update(context: Context, side: str, step: int, names: list[str]) -> list[Cause]:
    """The update's correction with the betas that the moments of the same step show."""
    betas: dict[str, float] = {}
    for kind, key in _KINDS:
        beta = _fit_beta(context, side, step, [f"{name}/{kind}" for name in names])
        if beta is not None:
            betas[key] = beta
    if not betas:
        return []
    sums, explained = Sums(), []
    for name in names:
        one, follows = supposed(context, side, Phase.PARAM, step, name, with_hyper(**betas), _CORRECTED)
        if follows and one.share >= SHOWN:
            sums += one
            explained.append(name)
    return [_cause(context, side, step, Phase.PARAM, explained, betas, sums)] if explained else []


def _fit_beta(context: Context, side: str, step: int, names: list[str]) -> float | None:
    """One beta over all named moments; None if they hold nothing that could tell, or it is not between 0 and 1."""
    top = bottom = 0.0
    for name in names:
        inputs = inputs_of(context, side, Phase.OPT_STATE, step, name)
        if not isinstance(inputs, MomentInputs) or inputs.gradient.size != inputs.after.size:
            continue
        if inputs.kind in (FIRST_MOMENT, SECOND_MOMENT):
            for away, moved in _deviations(inputs):
                top += float(np.dot(moved, away))
                bottom += float(np.dot(away, away))
    beta = top / bottom if bottom > 0.0 else -1.0
    return short(beta) if 0.0 <= beta < 1.0 else None


def _deviations(inputs: MomentInputs) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """State before and after, both less what is taken in, in blocks."""
    for start in inputs.after.blocks():
        taken = inputs.gradient.block(start, start + BLOCK)
        if inputs.kind == SECOND_MOMENT:
            taken = np.square(taken)
        yield inputs.before.block(start, start + BLOCK) - taken, inputs.after.block(start, start + BLOCK) - taken


def _cause(
    context: Context, side: str, step: int, phase: Phase, names: list[str], betas: dict[str, float], sums: Sums
) -> Cause:
    inputs = inputs_of(context, side, phase, step, names[0])
    recorded = {key: getattr(inputs.hyper, key) for key in betas} if inputs is not None else {}
    words = ", ".join(f"{key} {beta:g} (it records {recorded.get(key, 0.0):g})" for key, beta in betas.items())
    what = "moments" if phase is Phase.OPT_STATE else "bias correction"
    return Cause(
        ID, f"{side}'s {what} follow {words}" if phase is Phase.OPT_STATE else f"{side}'s {what} follows {words}",
        side=side, step=step, phase=phase.label, names=parameters_named(names, phase),
        parameters={**betas, "recorded": recorded}, explains=sums.share,
    )  # fmt: skip
