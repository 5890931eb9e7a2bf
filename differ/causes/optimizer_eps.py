"""`optimizer.eps`: another eps than recorded or than the other side's, or eps added at another place.

    outside   lr m^ / (sqrt(v^) + eps)                          torch.optim.Adam, mlx.optimizers.Adam
    inside    lr m^ / sqrt(v^ + eps)                            AMSGrad-style and RMSprop variants
    before    lr m^ sqrt(1 - b2^t) / (sqrt(v) + eps)            old HF AdamW, transformers #35504
    supposed  eps that leaves the least |after - replay(eps)|, by grid and golden section on log eps, for a side that
              follows no rule with the recorded eps

Only elements with sqrt(v^) of the size of eps can tell; elsewhere the rules are one.  Undone: each side replayed under its
own rule, or with the fitted eps.  A recorded eps that differs is found in `hparams`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.causes.optimizers import settings_causes
from differ.causes.updates import (
    between,
    fit,
    how_many,
    inputs_of,
    strays,
    supposed,
    with_hyper,
)
from differ.replay.rules.adam import RULES as ADAM_RULES
from differ.replay.rules.base import Rule
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "optimizer.eps"

ASPECT: Final = "eps"
_WORDS: Final = {
    "outside": "adds eps to the corrected root",
    "inside": "adds eps inside the root",
    "before": "adds eps before the correction",
    "norm": "adds eps to the gradient's size",
}
# eps is looked for from 1e-16 to 1, three to a decade, then refined.
_GRID: Final = tuple(10.0 ** (k / 3.0) for k in range(-48, 1))
_REFINEMENTS: Final = 40


def find(context: Context) -> list[Cause]:
    """Causes from the settings, from the rules, and from sides that follow no rule."""
    causes = settings_causes(context, ID, ("eps",), "eps")
    for step, phase, _ in context.groups(Phase.PARAM):
        causes += _between(context, step, phase)
        causes += _fitted(context, step)
    return causes


def _between(context: Context, step: int, phase: Phase) -> list[Cause]:
    """The two sides add eps at different places."""
    causes = []
    for (a, b), group in between(context, phase, step, ASPECT).items():
        if a not in _WORDS or b not in _WORDS:
            continue
        # Adding it to the corrected root is what torch and MLX do.
        side = None if "outside" not in (a, b) else "a" if b == "outside" else "b"
        order = (("b", b), ("a", a)) if side == "b" else (("a", a), ("b", b))
        summary = f"{order[0][0]} {_WORDS[order[0][1]]}; {order[1][0]} {_WORDS[order[1][1]]}"
        causes.append(
            Cause(
                ID, summary, side=side, step=step, phase=phase.label, names=tuple(group.names), parameters={"a": a, "b": b},
                explains=group.sums.share,
            )
        )  # fmt: skip
    return causes


def _fitted(context: Context, step: int) -> list[Cause]:
    """A side that uses another eps than it records, one for all tensors."""
    causes = []
    for side, names in strays(context, Phase.PARAM, step):
        fitted = _fit_eps(context, side, step, names)
        if fitted is None:
            continue
        eps, how = fitted
        sums, explained = Sums(), []
        for name in names:
            one, follows = supposed(context, side, Phase.PARAM, step, name, with_hyper(eps=eps), (how,))
            if follows and one.share >= SHOWN:
                sums += one
                explained.append(name)
        if explained:
            inputs = inputs_of(context, side, Phase.PARAM, step, explained[0])
            recorded = 0.0 if inputs is None else inputs.hyper.eps
            summary = f"{side} uses eps {eps:g}{how_many(explained, len(names))}; it records {recorded:g}"
            causes.append(
                Cause(
                    ID, summary, side=side, step=step, phase=Phase.PARAM.label, names=tuple(explained),
                    parameters={"eps": eps, "recorded": recorded}, explains=sums.share,
                )
            )  # fmt: skip
    return causes


def _fit_eps(context: Context, side: str, step: int, names: list[str]) -> tuple[float, Rule] | None:
    """eps and rule that leave the least in the tensor where they leave the largest share unexplained by the recorded eps."""
    best: tuple[float, float, Rule] | None = None
    name = max(names, key=lambda name: _stray_size(context, side, step, name))
    inputs = inputs_of(context, side, Phase.PARAM, step, name)
    if inputs is None or ADAM_RULES[0] not in inputs.rules:
        return None
    for how in (how for how in ADAM_RULES if dict(how)[ASPECT] == "outside"):

        def residual(log_eps: float, how: Rule = how) -> float:
            found = fit(context, with_hyper(eps=math.exp(log_eps))(inputs), how).residual2
            return found if math.isfinite(found) else math.inf

        start = min((math.log(eps) for eps in _GRID), key=residual)
        refined = _minimum(residual, start - math.log(10.0) / 3.0, start + math.log(10.0) / 3.0)
        best = min(best or (math.inf, 0.0, how), (residual(refined), refined, how), key=lambda found: found[0])
    return None if best is None else (float(f"{math.exp(best[1]):.3g}"), best[2])


def _stray_size(context: Context, side: str, step: int, name: str) -> float:
    inputs = inputs_of(context, side, Phase.PARAM, step, name)
    if inputs is None:
        return 0.0
    return min(found if math.isfinite(found := fit(context, inputs, how).residual2) else 0.0 for how in inputs.rules)


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Minimum of a function with one valley between two points, by golden section."""
    shrink = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(_REFINEMENTS):
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2.0
