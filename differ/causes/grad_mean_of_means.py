"""`grad.mean_of_means`: micro-batches of unequal length averaged without their token counts.

    by tokens        G = sum n_i g_i / sum n_i
    mean of means    G = sum g_i / K

n_i supervised positions and g_i gradient of micro-batch i's mean loss, K micro-batches.  The identity needs the gradient of each
micro-batch, as rows of `grad` with a micro-batch number: two accumulated gradients alone can always be written as
some pair of g_i, so without those rows nothing is claimed.  A program that weighs its losses (transformers' Trainer) has
n_i g_i / sum n_i there, from which g_i follows.  The scale of an accumulated gradient is fitted (g_i may have been divided by
K already): c = sum G x / sum xx with x the weighted sum.  Undone: each side against the other's weights is the difference,
against its own the residual.  Sources: transformers #34191, #24725; mlx-lm #1413.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.causes.context import Context, Float64
from differ.causes.fit import Sums, squared
from differ.result import Cause
from tracer.schema import WHOLE_STEP, Phase

ID: Final = "grad.mean_of_means"


@dataclass(frozen=True, slots=True)
class _Weights:
    """Weights of the two ways to average, one a micro-batch; both sum to 1."""

    tokens: tuple[float, ...]
    means: tuple[float, ...]


def find(context: Context) -> list[Cause]:
    """At most one cause a step: one side weighs by tokens, the other does not."""
    causes = []
    for step, _, _ in context.groups(Phase.GRAD):
        weights = _weights(context, step)
        if weights is not None:
            for side, other in (("a", "b"), ("b", "a")):
                causes += _tested(context, step, side, other, weights)
    return causes


def _weights(context: Context, step: int) -> _Weights | None:
    """None unless both sides have the same token counts, at least two of them different."""
    numbers = context.micro_batches(Phase.BATCH, step)
    counts = [[context.scalar(side, Phase.BATCH, step, "tokens", number) for number in numbers] for side in "ab"]
    known = [count for count in counts[0] if count is not None]
    if counts[0] != counts[1] or len(known) < max(2, len(numbers)) or len(set(known)) == 1 or sum(known) <= 0:
        return None
    return _Weights(tuple(count / sum(known) for count in known), (1.0 / len(known),) * len(known))


def _tested(context: Context, step: int, side: str, other: str, weights: _Weights) -> list[Cause]:
    """`side` takes the mean of means, `other` weighs by tokens."""
    sums, names = Sums(), []
    for name in context.suspects(Phase.GRAD, step):
        mine, theirs = (context.values(which, Phase.GRAD, step, name) for which in (side, other))
        if mine is None or theirs is None:
            continue
        for parts in _candidates(context, side, other, step, name, weights):
            means, tokens = _sum(weights.means, parts), _sum(weights.tokens, parts)
            one = Sums(_off(mine, tokens) + _off(theirs, means), _off(mine, means) + _off(theirs, tokens))
            if one.share >= 0.99:
                sums += one
                names.append(name)
                break
    if not names:
        return []
    counts = [context.scalar(side, Phase.BATCH, step, "tokens", m) for m in context.micro_batches(Phase.BATCH, step)]
    shown = ", ".join(f"{count:g}" for count in counts if count is not None)
    what = f"micro-batches of unequal length ({shown} positions)"
    summary = f"{side} averages {what} without their token counts; {other} weighs them"
    return [
        Cause(
            ID, summary, side=side, step=step, phase=Phase.GRAD.label, names=tuple(names),
            parameters={"tokens": counts}, explains=sums.share,
        )
    ]  # fmt: skip


def _candidates(
    context: Context, side: str, other: str, step: int, name: str, weights: _Weights
) -> Iterator[list[Float64]]:
    """What the gradients of the micro-batches' mean losses may be: as recorded, or as recorded by a program that had its losses
    weighted by tokens already, without that weight.
    """
    for which in (side, other):
        parts = _parts(context, which, step, name)
        if parts is not None and len(parts) == len(weights.means):
            yield parts
            yield [part / weight for part, weight in zip(parts, weights.tokens, strict=True)]


def _parts(context: Context, side: str, step: int, name: str) -> list[Float64] | None:
    """The gradient of each micro-batch, None if one was not recorded."""
    numbers = [number for number in context.trace(side).micro_batches(Phase.GRAD, step) if number != WHOLE_STEP]
    parts = [context.values(side, Phase.GRAD, step, name, number) for number in numbers]
    known = [part for part in parts if part is not None]
    return known if known and len(known) == len(parts) else None


def _sum(weights: tuple[float, ...], parts: list[Float64]) -> Float64:
    total: Float64 = np.sum([weight * part for weight, part in zip(weights, parts, strict=True)], axis=0)
    return total


def _off(recorded: Float64, expected: Float64) -> float:
    """Squared residual of the best multiple of an expected gradient."""
    size = squared(expected)
    factor = float(np.dot(recorded.reshape(-1), expected.reshape(-1))) / size if size > 0.0 else 0.0
    return squared(recorded - factor * expected)
