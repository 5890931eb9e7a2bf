"""Traces of several ranks in a comparison: how their micro-batches stand beside those of one process, and replicas that drift.

A run on W ranks has W times the micro-batches of a process that is given the same rows at once, and as many as one that
accumulates them.  `settle` chooses the view under which both sides have equally many, and among the orders that loaders deal
in the one under which the first batches are the same; nothing is chosen by anything but counts and equality.

A record that is to be the same on all ranks and is not (`RowView.drifts`) is a finding, at the record with the largest distance;
what the model computes from there on is not compared.  Drift that both sides have to the bit is a note, and explains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from differ.align import Tensor
from differ.compare import Distance, distance, element, multi_index
from differ.result import Cause, Finding, Kind
from differ.session import RowPair, Session
from tracer.built import Drift
from tracer.ranks import Order, RankTrace
from tracer.reader import RowView, Trace
from tracer.schema import Phase

# A constant factor between two ranks is said if it leaves no more than this of the difference.
FACTOR_LEAVES: Final = 1e-4


def settle(a: Trace, b: Trace) -> tuple[Trace, Trace]:
    """The two traces in the views in which they are compared; a trace of one process is returned as it is."""
    step = next((step for step in a.steps if step > 0 and step in b.steps), None)
    spread = [isinstance(trace, RankTrace) and not trace.same_batches for trace in (a, b)]
    if step is None or not any(spread):
        return a, b
    counts = [_count(trace, step) for trace in (a, b)]
    if counts[0] == counts[1]:
        joins = [False, False]
    else:
        each = [
            count // trace.world_size if isinstance(trace, RankTrace) and split else count
            for trace, count, split in zip((a, b), counts, spread, strict=True)
        ]
        joins = next(
            (
                choice
                for choice in ([True, False], [False, True], [True, True])
                if all(split or not join for split, join in zip(spread, choice, strict=True))
                and len({e if join else n for e, n, join in zip(each, counts, choice, strict=True)}) == 1
            ),
            [False, False],
        )
    if isinstance(a, RankTrace) and isinstance(b, RankTrace) and a.world_size == b.world_size and joins[0] == joins[1]:
        return a, b
    if isinstance(a, RankTrace) and spread[0]:
        a = _view(a, b, step, joined=joins[0])
    if isinstance(b, RankTrace) and spread[1]:
        b = _view(b, a, step, joined=joins[1])
    return a, b


def settle_twin(twin: Trace, sides: Iterable[Trace]) -> Trace:
    """A twin of ranks in the view of the side that it belongs to."""
    for side in sides:
        if isinstance(twin, RankTrace) and isinstance(side, RankTrace) and twin.world_size == side.world_size:
            return twin.view(order=side.order, joined=side.joined)
    return twin


def _count(trace: Trace, step: int) -> int:
    return len(trace.micro_batches(Phase.BATCH, step)) or len(trace.micro_batches(Phase.LOSS, step))


def _view(ranks: RankTrace, other: Trace, step: int, *, joined: bool) -> RankTrace:
    """The ranks in the order in which their batches are those of the other side; in the usual one if in none."""
    views = [ranks.view(order=order, joined=joined) for order in Order]
    return next((view for view in views if _same_batches(view, other, step)), views[0])


def _same_batches(a: Trace, b: Trace, step: int) -> bool:
    for number in a.micro_batches(Phase.BATCH, step):
        rows = a.row(Phase.BATCH, step, number), b.row(Phase.BATCH, step, number)
        if rows[0] is None or rows[1] is None or not _equal(rows[0], rows[1]):
            return False
    return True


def _equal(a: RowView, b: RowView) -> bool:
    """Whether two batches hold the same in all records that both have."""
    positions = a.layout.positions, b.layout.positions
    common = [name for name in positions[0] if name in positions[1]]
    return bool(common) and all(a.digests[positions[0][n]] == b.digests[positions[1][n]] for n in common)


def note_ranks(session: Session) -> None:
    """Say how the ranks of either side were put beside the other."""
    both = session.a.trace, session.b.trace
    views = {(one.world_size, one.order, one.joined, one.same_batches) for one in both if isinstance(one, RankTrace)}
    if len(views) == 1 and all(isinstance(one, RankTrace) for one in both):
        return
    for side, trace in zip("ab", both, strict=True):
        if not isinstance(trace, RankTrace):
            continue
        summary = f"{side} ran on {trace.world_size} ranks"
        if trace.same_batches:
            summary += ", which are all given the same batches; they count once"
        elif trace.joined:
            summary += f"; their micro-batches are joined into one, rows {trace.order.value}"
        else:
            turns = "rank after rank within each" if trace.order is Order.BY_RANK else "all of one rank first"
            summary += (
                f"; their micro-batches are taken as further ones, {turns}, each loss divided by {trace.world_size}"
            )
        session.note_once(Cause("ranks", summary, side=side))


def find_drift(session: Session, pair: RowPair) -> None:
    """Report what the ranks of either side hold differently in a row, before the row is compared."""
    drifts = {"a": pair.a.view.drifts, "b": pair.b.view.drifts}
    if not drifts["a"] and not drifts["b"]:
        return
    bits = {side: {_bits(drift) for drift in found} for side, found in drifts.items()}
    for side, other in (("a", "b"), ("b", "a")):
        wanted = [d for d in drifts[side] if session.options.wants_name(d.name)]
        own = [drift for drift in wanted if _bits(drift) not in bits[other]]
        if len(own) < len(wanted):
            summary = (
                f"on both sides ranks hold different values, the same ones, from step {pair.step} {pair.phase.label} on"
            )
            if session.first_time("drift", "both"):
                session.note_once(Cause("ranks.drift", summary, step=pair.step, phase=pair.phase.label))
        if own:
            _find(session, pair, side, own)
            # From here on there is not one model.
            if pair.phase in (Phase.PARAM, Phase.INIT):
                session.block_model(pair.phase)
            session.block_step(pair.phase)


def _bits(drift: Drift) -> tuple[object, ...]:
    held = [row.digests[row.layout.positions[drift.name]].tobytes() for row in (drift.first, drift.other)]
    return (drift.name, drift.rank, *held)


def _find(session: Session, pair: RowPair, side: str, drifts: list[Drift]) -> None:
    if not session.first_time("drift", side, session.options.wants_phase(pair.phase)):
        for drift in drifts:
            session.tally.repeated(pair.phase, drift.name)
        return
    measured = {drift.name: _measure(drift) for drift in drifts}
    foremost = max(drifts, key=lambda drift: 0.0 if (one := measured[drift.name]) is None else one[0].diff)
    session.tally.explained(pair.phase, len(drifts) - 1)
    ranks = sorted({drift.rank for drift in drifts})
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    detail = f"{side}: {named} and rank 0 hold different values where they should hold the same"
    found = measured[foremost.name]
    if found is None:
        session.tally.find(
            Finding(pair.step, pair.phase.label, foremost.name, Kind.REPLICA, pair.shown_micro_batch, detail=detail)
        )
        return
    apart, (first, other) = found
    at = apart.nonfinite if apart.nonfinite >= 0 else apart.at
    numbers = f"{element(first, at):.6g} on rank 0 and {element(other, at):.6g} on rank {foremost.rank}"
    index = multi_index(at, first.shape)
    place = f" at {list(index)}" if index else ""
    detail += f": {numbers}{place}{_factor(foremost.rank, first, other)}"
    session.tally.find(
        Finding(
            pair.step, pair.phase.label, foremost.name, Kind.REPLICA, pair.shown_micro_batch, rel_l2=apart.rel_l2(),
            max_abs=apart.max_abs, index=index, tolerance=0.0, required=apart.rel_l2(), detail=detail,
        )
    )  # fmt: skip


def _measure(drift: Drift) -> tuple[Distance, tuple[Tensor, Tensor]] | None:
    """Distance between two ranks' values of a record; None where one has none, or another shape."""
    tensors = []
    for row in (drift.first, drift.other):
        i = row.layout.positions[drift.name]
        if not row.stored(i):
            return None
        tensors.append(Tensor(row.read(i), row.layout.entries[i].dtype))
    if tensors[0].shape != tensors[1].shape or not tensors[0].size:
        return None
    return distance(*tensors), (tensors[0], tensors[1])


def _factor(rank: int, first: Tensor, other: Tensor) -> str:
    """What to say if one rank's values are a multiple of the other's."""
    cross = square = norm = 0.0
    for start in first.blocks():
        x, y = first.block(start, start + 2**20), other.block(start, start + 2**20)
        cross, square, norm = cross + float(x @ y), square + float(x @ x), norm + float(y @ y)
    if not (math.isfinite(cross) and square > 0.0 and norm > 0.0):
        return ""
    factor = cross / square
    left = norm - factor * cross
    whole = norm - 2.0 * cross + square
    if whole <= 0.0 or left > FACTOR_LEAVES**2 * whole or first.size < 2:
        return ""
    return f"; rank {rank} holds {factor:.6g} times as much"
