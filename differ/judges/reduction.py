"""Losses of several micro-batches under two reductions: the same numbers, weighted in another place.

Over K micro-batches of n_m supervised tokens, N in all, a program differentiates

    mean      the mean over each micro-batch's tokens, and divides the accumulated gradient by K afterwards
    1/K       that mean divided by K
    n_m/N     the sum over the micro-batch's tokens divided by N

(plain loops and mlx-lm; loops that scale the loss; transformers' Trainer with `num_items_in_batch`).  If the two sides'
losses of a step agree once each is divided by its weight, and the factor has not reached the accumulated gradient, the
loss is the same.  A factor that has (a forgotten division) is a divergence of the loss.  Where the gradients of the
micro-batches were recorded, each side's accumulated one must be what its own reduction makes of them; otherwise the two
sides' must be of one size.  With one micro-batch the three are one, and nothing is excused.

What the gradients of one step bear out holds for later ones: by then they may be of other sizes for reasons of their own.
There the losses must agree as well, and gradients of micro-batches must not say otherwise; a factor that reaches the
accumulated gradient later is found in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.align import Rows
from differ.judges.loss import LOSS, TOKENS
from differ.session import RowPair, Session
from tracer.dtypes import to_float64
from tracer.schema import REPORTED_PREFIX, Phase

# Gradients further apart than this in norm have got the factor too; the smallest is 2, for two micro-batches.
ALIKE: Final = 1.4
WORDS: Final = {
    "mean": "each micro-batch's mean loss",
    "1/K": "each micro-batch's mean loss divided by their number",
    "n/N": "each micro-batch's summed loss divided by all tokens of the step",
}


@dataclass(frozen=True, slots=True)
class Reductions:
    """The two sides' reductions, and the largest relative difference that is left once they are undone."""

    a: str
    b: str
    left: float
    # Weight of each micro-batch's loss on either side.
    weights: Mapping[int, tuple[float, float]]

    @property
    def sentence(self) -> str:
        """For a note."""
        return f"a differentiates {WORDS[self.a]}, b {WORDS[self.b]}; the gradients are judged on their own"


def reductions(session: Session, pair: RowPair, allowed: float) -> Reductions | None:
    """Two different reductions under which all losses of the step agree within `allowed`; None if there are none."""
    micro_batches = session.a.trace.micro_batches(Phase.LOSS, pair.step)
    if len(micro_batches) < 2 or micro_batches != session.b.trace.micro_batches(Phase.LOSS, pair.step):
        return None
    a, b = (_values(rows, Phase.LOSS, LOSS, pair.step, micro_batches) for rows in (session.a, session.b))
    # Batches that differ are found before; what one side alone recorded holds for both.
    tokens = next((t for t in (_tokens(rows, pair.step, micro_batches) for rows in (session.a, session.b)) if t), None)
    if a is None or b is None:
        return None
    weights = {"mean": [1.0] * len(a), "1/K": [1.0 / len(a)] * len(a)}
    if tokens is not None and sum(tokens) > 0.0:
        weights["n/N"] = [n / sum(tokens) for n in tokens]
    left = {
        (mine, theirs): max(_apart(x, y, u, v) for x, y, u, v in zip(a, b, weights[mine], weights[theirs], strict=True))
        for mine, theirs in itertools.permutations(weights, 2)
    }
    fitting = [rules for rules, error in left.items() if error <= allowed]
    known = [rules for rules in fitting if rules in session.reductions]
    for mine, theirs in known or fitting:
        if _averaged(session, pair.step, micro_batches, (mine, theirs), tokens):
            session.reductions = frozenset(known or fitting)
            pairs = zip(weights[mine], weights[theirs], strict=True)
            return Reductions(mine, theirs, left[mine, theirs], dict(zip(micro_batches, pairs, strict=True)))
    return None


def _tokens(rows: Rows, step: int, micro_batches: tuple[int, ...]) -> list[float] | None:
    return _values(rows, Phase.BATCH, TOKENS, step, micro_batches)


def _averaged(
    session: Session, step: int, micro_batches: tuple[int, ...], rules: tuple[str, str], tokens: list[float] | None
) -> bool:
    """Whether both sides' accumulated gradients are means over the step, as their reductions have it."""
    sides = zip((session.a, session.b), rules, strict=True)
    found = [_follows(rows, step, micro_batches, rule, tokens) for rows, rule in sides]
    if False in found:
        return False
    return None not in found or rules in session.reductions or _gradients_alike(session, step)


def _follows(
    rows: Rows, step: int, micro_batches: tuple[int, ...], rule: str, tokens: list[float] | None
) -> bool | None:
    """Whether a side's accumulated gradient has the size that its reduction gives it; None without those of the micro-batches.

    Looked at in the largest tensor: the factors in question are 2 and more.
    """
    whole, parts = rows.get(Phase.GRAD, step), [rows.get(Phase.GRAD, step, m) for m in micro_batches]
    if whole is None or None in parts:
        return None
    each = [part for part in parts if part is not None]
    names = [
        name
        for name in whole.positions
        if not name.startswith(REPORTED_PREFIX)
        and all(name in row.positions and row.stored(name) for row in (whole, *each))
    ]
    if not names:
        return None
    name = max(names, key=whole.l2)
    total, *gradients = (to_float64(row.read(name).stored, row.entry(name).dtype).reshape(-1) for row in (whole, *each))
    means = [[1.0 / len(each)] * len(each)]
    if tokens is not None and sum(tokens) > 0.0:
        means.append([n / sum(tokens) for n in tokens])
    for weights in means if rule == "mean" else [[1.0] * len(each)]:
        expected = np.sum([w * g for w, g in zip(weights, gradients, strict=True)], axis=0)
        size = float(expected @ expected)
        factor = float(total @ expected) / size if size > 0.0 else 0.0
        if 1.0 / ALIKE < factor < ALIKE:
            return True
    return False


def _gradients_alike(session: Session, step: int) -> bool:
    """Whether both sides' accumulated gradients are of one size: a factor of two or more would show.  From statistics."""
    norms = []
    for rows in (session.a, session.b):
        row = rows.get(Phase.GRAD, step)
        if row is None:
            return False
        kept = [i for name, i in row.positions.items() if not name.startswith(REPORTED_PREFIX)]
        norms.append(math.sqrt(float((row.view.stats[kept, 0] ** 2).sum())))
    return min(norms) > 0.0 and max(norms) / min(norms) < ALIKE


def _apart(a: float, b: float, weight_a: float, weight_b: float) -> float:
    """Relative difference of two losses without their weights, as the judge measures it."""
    if not (math.isfinite(a) and math.isfinite(b)) or weight_a == 0.0 or weight_b == 0.0:
        return math.inf
    mean_a, mean_b = a / weight_a, b / weight_b
    return abs(mean_a - mean_b) / max(abs(mean_a), abs(mean_b), 1.0)


def _values(rows: Rows, phase: Phase, name: str, step: int, micro_batches: tuple[int, ...]) -> list[float] | None:
    """One number per micro-batch, or None if one is missing."""
    found = [row.scalar(name) if (row := rows.get(phase, step, m)) is not None else None for m in micro_batches]
    return None if any(value is None for value in found) else [float(value) for value in found if value is not None]
