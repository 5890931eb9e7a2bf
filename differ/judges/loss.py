"""Replay the reduced loss of a micro-batch from its own token losses: which reduction gives the number that was differentiated.

    loss = S / d     S: sum of the micro-batch's token losses, in float64
                     d: n, its supervised tokens; n K, of K micro-batches; N, the supervised tokens of the step; 1; its rows; all
                     its positions; all its predicted positions

A loss follows a reduction if it is S over that number to within `ulp` units in the last place of its dtype for each doubling of
what is summed (a tree of sums rounds once a level; a plain loop is not much worse for losses, which are all positive).
Reductions that give the same number (n = N with one micro-batch) are all followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.align import Rows
from differ.session import RowPair, Session
from tracer.dtypes import EPSILON, to_float64
from tracer.schema import TOKEN_LOSS, Phase

LOSS: Final = "loss"
TOKENS: Final = "tokens"


@dataclass(frozen=True, slots=True)
class Replay:
    """What a side's loss is under the known reductions: those that it follows, and the error under the nearest."""

    rules: frozenset[str]
    nearest: str
    error: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Replays:
    """Both sides; None where a side has no token losses."""

    a: Replay | None
    b: Replay | None

    @property
    def odd(self) -> str:
        """The one side that follows no known reduction where the other follows one; empty if that is not so."""
        if self.a is None or self.b is None or bool(self.a.rules) == bool(self.b.rules):
            return ""
        return "b" if self.a.rules else "a"

    @property
    def sentence(self) -> str:
        """What each side does, for a finding; empty where that is the same, or not known."""
        if self.a is None or self.b is None or self.a.rules & self.b.rules:
            return ""
        return "; ".join(_words(side, replay) for side, replay in (("a", self.a), ("b", self.b)))


def _words(side: str, replay: Replay) -> str:
    if replay.rules:
        return f"{side}'s loss is its token losses' {replay.nearest}"
    return f"{side}'s loss does not follow from its token losses (nearest: the {replay.nearest}, off by {replay.error:.3g})"


def replays(session: Session, pair: RowPair) -> Replays | None:
    """Replay a micro-batch's loss on both sides; None where neither recorded token losses."""
    found = [_replay(session, rows, pair.step, pair.micro_batch) for rows in (session.a, session.b)]
    return None if found == [None, None] else Replays(*found)


def _replay(session: Session, rows: Rows, step: int, micro_batch: int) -> Replay | None:
    row = rows.get(Phase.LOSS, step, micro_batch)
    if row is None or TOKEN_LOSS not in row.positions or not row.stored(TOKEN_LOSS):
        return None
    loss, tensor = row.scalar(LOSS), row.read(TOKEN_LOSS)
    losses = to_float64(tensor.stored, tensor.dtype)
    if loss is None or losses.ndim != 2 or not (math.isfinite(loss) and np.isfinite(losses).all()):
        return None
    dtype = row.entry(LOSS).dtype
    # Sums are computed in float32 and rounded to the dtype of the loss.
    tolerance = session.policy.replay(dtype).ulp * (
        EPSILON.get(dtype, EPSILON["float64"]) + EPSILON["float32"] * math.log2(max(2, losses.size))
    )
    total = float(losses.sum())
    errors = {
        words: abs(loss - total / number) / max(abs(loss), abs(total / number), np.finfo(np.float64).tiny)
        for words, number in _denominators(rows, step, micro_batch, losses.shape, int(np.count_nonzero(losses)))
        if number > 0
    }
    nearest = min(errors, key=lambda words: errors[words])
    rules = frozenset(words for words, error in errors.items() if error <= tolerance)
    return Replay(rules, nearest, errors[nearest], tolerance)


def _denominators(
    rows: Rows, step: int, micro_batch: int, shape: tuple[int, ...], nonzero: int
) -> Iterator[tuple[str, float]]:
    """What each known reduction divides the sum by, the usual ones first."""
    count, length = shape
    micro_batches = rows.trace.micro_batches(Phase.LOSS, step)
    tokens = {m: _tokens(rows, step, m) for m in micro_batches}
    mine = tokens.get(micro_batch)
    if mine is None:
        mine = float(nonzero)
    yield "mean", mine
    yield "mean divided by the micro-batches", mine * len(micro_batches)
    known = [number for number in tokens.values() if number is not None]
    if len(known) == len(micro_batches):
        yield "sum divided by the step's tokens", sum(known)
    yield "sum", 1.0
    yield "sum divided by the rows", float(count)
    yield "mean over all positions, supervised or not", float(count * length)
    yield "mean over all predicted positions, supervised or not", float(count * (length - 1))


def _tokens(rows: Rows, step: int, micro_batch: int) -> float | None:
    row = rows.get(Phase.BATCH, step, micro_batch)
    return None if row is None else row.scalar(TOKENS)
