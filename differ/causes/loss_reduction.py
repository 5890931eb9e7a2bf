"""`loss.reduction`: the two sides' losses differ by one factor, or by another denominator.

    l_b = c l_a                    one c over the micro-batches of a step, and the same c in the gradients (the test)
    l_b = l_a n_i / d_i            n_i supervised positions of micro-batch i; d_i what one side divides by instead:
                                   1 (a sum), all positions, all predicted positions, rows, the step's mean or sum of n

    l_b = l_a d_a / d_b            two of these, or one of them and the number of micro-batches K, see `loss_denominators`

One loss alone is equal to any factor times another, so a factor is claimed from several micro-batches with unequal losses,
or from gradients that carry it, or if it is a denominator to within the loss's rounding.  Two numbers are claimed where one
does not do and they scale the micro-batches by unequal factors, or the gradients carry d_a / d_b without K (who divides the
loss by K does not divide the gradients by it, and the other way round).  Some factors are several numbers at once: up to two
readings are both said, of more none is.  Undone: b's losses times d_i / n_i, times d_b / d_a, or over c.
Sources: transformers #34191, #35438; axolotl #2262; torch.nn.CrossEntropyLoss(reduction).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.causes.constants import name_factor, short
from differ.causes.context import Context
from differ.causes.fit import SHOWN, RatioFit, Sums
from differ.causes.loss_denominators import NOTHING, SUPERVISED, Explained, counts, explanations
from differ.result import Cause
from tracer.dtypes import EPSILON
from tracer.schema import REPORTED_PREFIX, Phase

ID: Final = "loss.reduction"

# A denominator is exact: the losses agree after it to this many units in the last place.
_ULPS: Final = 64.0
# The gradients' one factor is that of the losses to this relative error.
_CLOSE: Final = 1e-3
# That many readings of one factor are said; of more none is.
_READINGS: Final = 2


@dataclass(frozen=True, slots=True)
class _Losses:
    """Both sides' losses by micro-batch, and what each micro-batch could be divided by, in words."""

    a: Mapping[int, float]
    b: Mapping[int, float]
    denominators: Mapping[str, Mapping[int, float]]
    epsilon: float


def find(context: Context) -> list[Cause]:
    """At most one cause for each step with a finding in `loss`."""
    causes = []
    for step, _, _ in context.groups(Phase.LOSS):
        losses = _losses(context, step)
        if losses is not None:
            found = _denominator(step, losses, unequal=True) or _by_gradients(context, step, losses)
            causes += [found] if found is not None else []
    return causes


def _by_gradients(context: Context, step: int, losses: _Losses) -> Cause | None:
    gradients = _gradients(context, step)
    found = _constant(context, step, losses, gradients) or _two(context, step, losses, gradients)
    return _denominator(step, losses, unequal=False) if found is None and gradients is None else found


def _losses(context: Context, step: int) -> _Losses | None:
    a: dict[int, float] = {}
    b: dict[int, float] = {}
    epsilon = 0.0
    for number in context.micro_batches(Phase.LOSS, step):
        both = [context.scalar(side, Phase.LOSS, step, "loss", number) for side in "ab"]
        if both[0] is None or both[1] is None or not (math.isfinite(both[0]) and math.isfinite(both[1])):
            return None
        a[number], b[number] = both[0], both[1]
        dtypes = [context.dtype(side, Phase.LOSS, step, "loss", number) for side in "ab"]
        epsilon = max(epsilon, *(EPSILON.get(dtype or "", 0.0) for dtype in dtypes))
    if not a or not all(a.values()) or not all(b.values()):
        return None
    return _Losses(a, b, dict(_denominators(context, step, list(a))), epsilon)


def _denominators(context: Context, step: int, numbers: list[int]) -> Iterator[tuple[str, dict[int, float]]]:
    """n_i / d_i of each way to divide, by micro-batch; those that the batch's records allow."""
    known = counts(context, step, numbers)
    for base, values in known.items():
        if base != SUPERVISED:
            words = "does not divide by the supervised positions (a sum)" if base == NOTHING else f"divides by {base}"
            yield words, {n: known[SUPERVISED][n] / value for n, value in values.items()}


def _denominator(step: int, losses: _Losses, *, unequal: bool) -> Cause | None:
    """One side divides by something else; the first denominator that leaves nothing but rounding.

    `unequal`: only those that scale the micro-batches by unequal factors, which one constant cannot imitate.
    """
    for words, factors in losses.denominators.items():
        if len(factors) != len(losses.a) or (unequal and len(set(factors.values())) == 1):
            continue
        for side, mine, other in (("b", losses.b, losses.a), ("a", losses.a, losses.b)):
            sums = Sums()
            for n, factor in factors.items():
                sums += Sums((mine[n] - other[n]) ** 2, (mine[n] / factor - other[n]) ** 2)
            near = all(
                abs(mine[n] / factor - other[n]) <= _ULPS * losses.epsilon * max(1.0, abs(other[n]))
                for n, factor in factors.items()
            )
            if near and sums.share >= SHOWN:
                ratios = [short(losses.b[n] / losses.a[n]) for n in losses.a]
                return Cause(
                    ID, f"{side} {words}; {'a' if side == 'b' else 'b'} by those of each micro-batch", side=side, step=step,
                    phase=Phase.LOSS.label, names=("loss",),
                    parameters={"factor": ratios[0] if len(set(ratios)) == 1 else ratios, "denominator": words},
                    explains=sums.share,
                )  # fmt: skip
    return None


def _constant(context: Context, step: int, losses: _Losses, gradients: RatioFit | None) -> Cause | None:
    """One factor over the step's losses, borne out by several of them or by the gradients."""
    fit = RatioFit()
    for n in losses.a:
        fit.add(np.array([losses.a[n]]), np.array([losses.b[n]]))
    borne_out = gradients is not None and gradients.share >= SHOWN and abs(gradients.ratio / fit.ratio - 1.0) <= _CLOSE
    several = len(losses.a) > 1 and len(set(losses.a.values())) > 1
    if fit.share < SHOWN or fit.ratio <= 0.0 or not (borne_out or (several and gradients is None)):
        return None
    known = name_factor(context, step, fit.ratio, fit.error if several else 0.0)
    matches = " or ".join([*([known] if known else []), *_single(context, step, losses)][:2])
    big, small = ("b", "a") if fit.ratio > 1.0 else ("a", "b")
    summary = f"{big}'s loss is {max(fit.ratio, 1.0 / fit.ratio):.6g} times {small}'s"
    summary += (", and so are its gradients" if borne_out else "") + (f": {matches}" if matches else "")
    share = min(fit.share, gradients.share) if borne_out and gradients is not None else fit.share
    return Cause(
        ID, summary, step=step, phase=Phase.LOSS.label, names=("loss",),
        parameters={"factor": short(fit.ratio), "matches": matches, "gradients": borne_out}, explains=share,
    )  # fmt: skip


def _explained(context: Context, step: int, losses: _Losses) -> list[Explained]:
    return explanations(context, step, {"a": losses.a, "b": losses.b}, losses.epsilon)


def _single(context: Context, step: int, losses: _Losses) -> list[str]:
    """Denominators that are the one factor of all micro-batches, in words; none if many are."""
    found = [
        one
        for one in _explained(context, step, losses)
        if one.equal and one.constants == 1 and one.side is not None and NOTHING not in (one.a.base, one.b.base)
    ]
    return [one.words for one in found] if len(found) <= _READINGS else []


def _two(context: Context, step: int, losses: _Losses, gradients: RatioFit | None) -> Cause | None:
    """Two numbers that the losses' denominators have, where one does not do."""
    fitting = [one for one in _explained(context, step, losses) if one.constants == 2 and _borne_out(one, gradients)]
    readings = list(dict.fromkeys(one.words for one in fitting))
    if not 0 < len(readings) <= _READINGS:
        return None
    first, sums = fitting[0], Sums()
    for n, factor in first.factors.items():
        sums += Sums((losses.b[n] - losses.a[n]) ** 2, (losses.b[n] / factor - losses.a[n]) ** 2)
    sides = {one.side for one in fitting}
    ratios = [short(losses.b[n] / losses.a[n]) for n in losses.a]
    return Cause(
        ID, " or ".join(readings), side=first.side if len(sides) == 1 else None, step=step, phase=Phase.LOSS.label,
        names=("loss",), explains=sums.share,
        parameters={"factor": ratios[0] if len(set(ratios)) == 1 else ratios, "denominators": readings},
    )  # fmt: skip


def _borne_out(one: Explained, gradients: RatioFit | None) -> bool:
    """Whether the micro-batches or the gradients speak for two numbers rather than for any other factor of this size."""
    if not one.equal:
        return True
    micro = one.a.micro / one.b.micro
    if gradients is None or micro == 1.0 or gradients.share < SHOWN:
        return False
    return abs(gradients.ratio * micro / next(iter(one.factors.values())) - 1.0) <= _CLOSE


def _gradients(context: Context, step: int) -> RatioFit | None:
    """The ratio of all gradients of the step; None if none were recorded."""
    fit = RatioFit()
    for name in context.differing(Phase.GRAD, step):
        both = None if name.startswith(REPORTED_PREFIX) else context.pair(Phase.GRAD, step, name)
        if both is not None:
            fit.add(*both)
    return fit if fit.aa > 0.0 else None
