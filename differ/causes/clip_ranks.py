"""`clip.norm` on ranks: each rank clips by a norm of its own, where all should use one norm over all gradients.

    sharded      c_r = g_r min(1, n / |g_r|)     |g_r|: norm of the shard of rank r; the whole norm is the root of their squares
    replicated   c_r = f_r g                     factors that differ between ranks, which hold the same gradient

The factors are fitted on each rank's own records, f_r = sum g c / sum g g, and must leave rounding only.  Undone: sharded, every
shard with the factor of the whole norm against the other side's clipped gradients; replicated, rank r's with rank 0's factor
against what rank 0 holds.  Source: torchtune #2420.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.causes.context import Context, Float64
from differ.causes.fit import Sums, squared
from differ.result import Cause
from tracer.dtypes import EPSILON, to_float64
from tracer.ranks import RankTrace
from tracer.reader import RowView, Trace
from tracer.schema import REPORTED_PREFIX, Phase, State
from tracer.shards import piece_of

ID: Final = "clip.norm"
# Factors and limits that agree this well are the same.
SAME: Final = 1e-4
# What a factor may leave of a tensor, in units of rounding.
ROUNDINGS: Final = 16.0


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank did to its gradients: the factor, and the norm of what it holds."""

    factor: float
    norm: float


def find(context: Context) -> list[Cause]:
    """At most one cause a side, at the first step at which its ranks clip by different norms."""
    causes = []
    for side, other in (("a", "b"), ("b", "a")):
        trace = context.trace(side)
        if not isinstance(trace, RankTrace):
            continue
        for step, _, _ in context.groups(Phase.CLIPPED_GRAD):
            ranks = _ranks(trace.members, step)
            if ranks is None or max(r.factor for r in ranks) <= (1.0 + SAME) * min(r.factor for r in ranks):
                continue
            explained = _shards if _is_sharded(trace.members[0], step) else _replicas
            causes += explained(context, trace, ranks, step, side, other)
            break
    return causes


def _records(member: Trace, step: int) -> Iterator[tuple[str, RowView, int, Float64, Float64]]:
    """Name, row and position of the clipped gradient, and the gradient before and after, of every record of a rank."""
    grads, given = member.row(Phase.GRAD, step), member.row(Phase.CLIPPED_GRAD, step)
    if grads is None or given is None:
        return
    for name, i in given.layout.positions.items():
        j = grads.layout.positions.get(name)
        if name.startswith(REPORTED_PREFIX) or j is None or not (given.stored(i) and grads.stored(j)):
            continue
        if State.VALUE in (given.state(i), grads.state(j)):
            dtype = given.layout.entries[i].dtype
            yield (
                name,
                given,
                i,
                to_float64(grads.read(j), grads.layout.entries[j].dtype),
                to_float64(given.read(i), dtype),
            )


def _clipped(member: Trace, step: int, name: str) -> Float64 | None:
    """One clipped gradient of a rank, None if there is none."""
    row = member.row(Phase.CLIPPED_GRAD, step)
    i = None if row is None else row.layout.positions.get(name)
    if row is None or i is None or not row.stored(i) or row.state(i) not in (State.VALUE, State.ZERO):
        return None
    return to_float64(row.read(i), row.layout.entries[i].dtype)


def _ranks(members: Sequence[Trace], step: int) -> list[_Rank] | None:
    """The ranks' factors; None if one did anything but multiply all that it holds by one number."""
    found = []
    for member in members:
        before = cross = after = 0.0
        eps = 0.0
        for _, row, i, gradient, clipped in _records(member, step):
            before += squared(gradient)
            cross += float(np.dot(gradient.reshape(-1), clipped.reshape(-1)))
            after += squared(clipped)
            eps = max(eps, EPSILON.get(row.layout.entries[i].dtype, 0.0))
        if not (before > 0.0 and cross > 0.0 and math.isfinite(after)):
            return None
        factor = cross / before
        if after - factor * cross > (ROUNDINGS * eps) ** 2 * after + 1e-15 * after:
            return None
        found.append(_Rank(factor, math.sqrt(before)))
    return found


def _is_sharded(member: Trace, step: int) -> bool:
    row = member.row(Phase.GRAD, step)
    return row is not None and any(piece_of(entry.transform) is not None for entry in row.layout.entries)


def _shards(
    context: Context, trace: RankTrace, ranks: Sequence[_Rank], step: int, side: str, other: str
) -> list[Cause]:
    """Each rank clips its shard by the shard's own norm."""
    limits = [rank.factor * rank.norm for rank in ranks if rank.factor < 1.0 - SAME]
    if not limits or max(limits) > (1.0 + SAME) * min(limits):
        return []
    limit = limits[0]
    whole = min(1.0, limit / math.sqrt(sum(rank.norm**2 for rank in ranks)))
    sums, names = Sums(), []
    for member, rank in zip(trace.members, ranks, strict=True):
        for name, row, i, _, clipped in _records(member, step):
            expected = context.values(other, Phase.CLIPPED_GRAD, step, name)
            piece = piece_of(row.layout.entries[i].transform)
            if expected is None or (
                expected.shape != clipped.shape if piece is None else expected.shape != piece.whole
            ):
                continue
            part = expected if piece is None else expected[piece.box(clipped.shape)]
            sums.add(part, clipped, clipped * (whole / rank.factor))
            names.append(name)
    norms = " and ".join(f"{rank.norm:.4g}" for rank in ranks)
    summary = f"{side} clips on each rank by the norm of its own shard ({norms}) at {limit:.4g}, not by one norm of all"
    parameters = {"rule": "shard", "value": limit, "norms": [rank.norm for rank in ranks]}
    return [
        Cause(
            ID, summary, side=side, step=step, phase=Phase.CLIPPED_GRAD.label, names=tuple(dict.fromkeys(names)),
            parameters=parameters, explains=sums.share,
        )
    ]  # fmt: skip


def _replicas(
    context: Context,  # noqa: ARG001 - rank 0 is what the others are compared with
    trace: RankTrace,
    ranks: Sequence[_Rank],
    step: int,
    side: str,
    other: str,  # noqa: ARG001
) -> list[Cause]:
    """Ranks that hold one gradient, and clip it by different factors."""
    sums, names = Sums(), []
    odd = [number for number, rank in enumerate(ranks) if abs(rank.factor / ranks[0].factor - 1.0) > SAME]
    for number in odd:
        for name, _, _, _, clipped in _records(trace.members[number], step):
            first = _clipped(trace.members[0], step, name)
            if first is not None and first.shape == clipped.shape:
                sums.add(first, clipped, clipped * (ranks[0].factor / ranks[number].factor))
                names.append(name)
    shown = ", ".join(f"rank {number} by {ranks[number].factor:.6g}" for number in (0, *odd))
    summary = f"{side} multiplies the same gradient by different factors: {shown}; each clips by a norm of its own"
    return [
        Cause(
            ID, summary, side=side, step=step, phase=Phase.CLIPPED_GRAD.label, names=tuple(dict.fromkeys(names)),
            parameters={"rule": "rank", "factors": [rank.factor for rank in ranks]}, explains=sums.share,
        )
    ]  # fmt: skip
