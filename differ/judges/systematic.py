"""Gradients that one constant ratio near 1 relates, beyond what rounding may do: systematic but small, a note and no divergence.

    c            sqrt(sum bb / sum aa) over all records of the step
    excused      |log c| <= systematic (the policy's, [notes]), the same c at every step that shows one, and every record
                 within its own tolerance once c is undone: |b / sqrt(c) - a sqrt(c)| / max(|a|, |b|) <= allowed
    shows one    |log c| > allowed / 2, the smallest of the records'.  Of what is beyond its tolerance c must be half at least,
                 |a - b| / max(|a|, |b|) <= 2 |log c|, so that a tolerance too wide for c to show lets it pass as it is

Invariant: a wider tolerance never makes a divergence of what is excused.

A learning rate rounded to bfloat16 or an auxiliary head counted with another length (Megatron-LM #3159) does this.  What
c does not undo everywhere stays a divergence; a user's own rule judges alone.  Whatever is excused is noted, with c, so
that `--fail-on note` fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from differ.align import BLOCK, Row
from differ.result import Cause
from differ.session import RowPair, Session
from tracer.schema import REPORTED_PREFIX, WHOLE_STEP, Phase, State

if TYPE_CHECKING:
    from differ.judges.model import Allowance

ID: Final = "grad.scale"
# Ratios of two steps are the same if their deviations from 1 agree to this share, and within the steps' noise.
ALIKE: Final = 0.1
# Fewer records say nothing of a whole phase.
FEWEST: Final = 2


@dataclass(frozen=True, slots=True)
class _Record:
    """One record: its relative error, what is left of it once the ratio is undone, and what is allowed."""

    name: str
    error: float
    left: float
    allowed: Allowance
    difference2: float
    left2: float

    def excused(self, deviation: float) -> bool:
        """Whether a ratio with that logarithm is what the difference is."""
        return self.left <= self.allowed.error and self.error <= max(self.allowed.error, 2.0 * deviation)


def excused(
    session: Session, pair: RowPair, names: Sequence[str], granted: Callable[[str], Allowance], floor: float
) -> frozenset[str]:
    """The records of this row that differ by one small ratio only, all or none but what a user's own rule judges; counts and
    notes them.

    `names`: those whose bits differ.  `granted`: what a record may differ by.  `floor`: norm under which one is noise.
    """
    judged = [] if pair.phase is not Phase.GRAD else [n for n in names if not session.tolerance(pair, n).explicit]
    if pair.micro_batch != WHOLE_STEP or not judged or len(names) < FEWEST:
        return frozenset()
    ratio = _ratio(session, pair)
    if ratio is None or _unmoved(pair, names):
        return frozenset()
    allowed = {name: granted(name) for name in judged}
    if not all(one.judges for one in allowed.values()):
        return frozenset()
    # Less would pass as it is, and is a note of another kind.
    smallest, deviation = min(one.error for one in allowed.values()), abs(math.log(ratio))
    if deviation <= smallest / 2 or not _same_as_before(session, ratio, smallest):
        return frozenset()
    records = [_undo(pair, name, ratio, allowed[name], floor) for name in judged]
    if not all(one.excused(deviation) for one in records):
        return frozenset()
    for one in records:
        session.measured(pair, one.name, one.left, one.allowed.error, distance=one.allowed.distance)
    _note(session, pair, ratio, smallest, records)
    return frozenset(judged)


def _ratio(session: Session, pair: RowPair) -> float | None:
    """The ratio of the two sides' gradients, None where it is not a small one."""
    systematic = session.policy.systematic
    sizes = [_norm(row) for row in (pair.a, pair.b)]
    if not (systematic > 0.0 and min(sizes) > 0.0 and all(math.isfinite(size) for size in sizes)):
        return None
    ratio = sizes[1] / sizes[0]
    return ratio if abs(math.log(ratio)) <= systematic else None


def _norm(row: Row) -> float:
    """L2 norm of all gradients of a row, from its statistics."""
    kept = [i for name, i in row.positions.items() if not name.startswith(REPORTED_PREFIX)]
    return math.sqrt(float((row.view.stats[kept, 0] ** 2).sum()))


def _unmoved(pair: RowPair, names: Sequence[str]) -> bool:
    """Whether some gradient has the same bits on both sides: then it is not the whole phase."""
    moved = set(names)
    return any(
        name in pair.b.positions and pair.a.state(name) is State.VALUE and pair.a.digest(name) == pair.b.digest(name)
        for name in pair.a.positions
        if name not in moved and not name.startswith(REPORTED_PREFIX)
    )


def _same_as_before(session: Session, ratio: float, noise: float) -> bool:
    """Whether one ratio can be that of this step and of all before it that show one.

    Each says where it may be, from as near as its noise lets it tell: a wider tolerance takes steps away and widens the rest.
    """
    deviation = math.log(ratio)
    room = (ALIKE * abs(deviation) + noise) / 2
    low, high = session.ratios.get(Phase.GRAD, (-math.inf, math.inf))
    low, high = max(low, deviation - room), min(high, deviation + room)
    session.ratios[Phase.GRAD] = (low, high)
    return low <= high


def _undo(pair: RowPair, name: str, ratio: float, allowed: Allowance, floor: float) -> _Record:
    """Both sides moved half of the way, so that it does not matter which is a."""
    a, b = pair.a.read(name), pair.b.read(name)
    half = math.sqrt(ratio)
    sums = [0.0] * 4
    for start in a.blocks():
        x, y = a.block(start, start + BLOCK), b.block(start, start + BLOCK)
        left, difference = y / half - x * half, y - x
        parts = (left, difference, x, y)
        sums = [total + float(np.dot(part, part)) for total, part in zip(sums, parts, strict=True)]
    scale = max(math.sqrt(max(sums[2], sums[3])), floor)
    remains, error = (math.sqrt(total) / scale if scale > 0.0 else 0.0 for total in sums[:2])
    return _Record(name, error, remains if math.isfinite(remains) else math.inf, allowed, sums[1], sums[0])


def _note(session: Session, pair: RowPair, ratio: float, smallest: float, records: Sequence[_Record]) -> None:
    if not session.first_time("systematic", pair.phase):
        return
    deviation = abs(ratio - 1.0)
    words = f"{ratio:.{max(3, 2 - math.floor(math.log10(deviation)))}f}"
    summary = (
        f"systematic but small: all gradients ({len(records):,}) are {words} times as large in b; rounding allows "
        f"{smallest:.1g}, [notes] systematic {session.policy.systematic:g}"
    )
    difference, left = sum(one.difference2 for one in records), sum(one.left2 for one in records)
    parameters = {"factor": float(words), "deviation": float(f"{ratio - 1.0:.3g}")}
    names = tuple(one.name for one in records)
    explains = 1.0 - left / difference if difference > 0.0 else None
    session.tally.note(
        Cause(
            ID, summary, step=pair.step, phase=pair.phase.label, names=names, parameters=parameters, explains=explains
        )
    )
