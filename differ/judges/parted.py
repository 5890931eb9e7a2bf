"""Parameters that a divergence in a phase left out of the judgement moved apart: they excuse nothing of what is judged.

With `--phases` a divergence elsewhere is no finding, so what comes of it must not be explained away either.  Adam turns rounding
noise of gradients into parameters that differ, so that unequal bits say nothing; what counts is

    |a - b| / max(|a - a0|, |b - b0|)    the difference beside how far training has moved the parameter, a0 and b0 from `init`
    allowed                              the tolerance of `param`, and `ulp` units in the last place of what is stored

beside a user's own rule for the parameter, which is about |a - b| / max(|a|, |b|) as ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from differ.align import Row, Rows
from differ.estimate import row_distance
from differ.result import Finding
from differ.session import RowPair, Session
from tracer.dtypes import coarser, is_float
from tracer.schema import WHOLE_STEP, Phase

# What the parameters after a step come from.
CHAIN: Final = (Phase.INIT, Phase.HPARAMS, Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)


@dataclass(frozen=True, slots=True)
class Apart:
    """How far a parameter's two sides are apart, and what is allowed; `of`: in words, what the error is relative to."""

    error: float
    allowed: float
    of: str = ""


def hidden(session: Session, phases: tuple[Phase, ...], phase: Phase, step: int) -> Finding | None:
    """The first divergence in those phases that was left out of the judgement, before a phase of a step."""
    known = session.tally.hidden
    found = [known[at] for at in phases if at in known and (known[at].step, at) < (step, phase)]
    return min(found, key=lambda finding: (finding.step, Phase.parse(finding.phase)), default=None)


def parted(session: Session, step: int) -> bool:
    """Whether the parameters that a step starts from differ by something that was left out of the judgement."""
    if session.options.phases is None or not session.tally.hidden:
        return False
    if step <= 1:
        return Phase.INIT in session.tally.hidden
    if session.options.wants_phase(Phase.PARAM):
        return False
    if session.parted_at is None:
        _look(session, step)
    return session.parted_at is not None and session.parted_at <= step


def _look(session: Session, step: int) -> None:
    first = hidden(session, CHAIN, Phase.CONFIG, step)
    if first is None:
        return
    for after in range(max(session.looked_to, first.step, 1), step):
        if _apart_after(session, after):
            session.parted_at = after + 1
            return
        session.looked_to = after + 1


def _apart_after(session: Session, step: int) -> bool:
    """Whether any parameter differs after a step by more than rounding noise makes it."""
    a, b = session.a.get(Phase.PARAM, step), session.b.get(Phase.PARAM, step)
    if a is None or b is None or a.view.seal == b.view.seal:
        return False
    pair = RowPair(Phase.PARAM, step, WHOLE_STEP, a, b)
    for name in a.positions:
        if name not in b.positions or a.shape(name) != b.shape(name) or not is_float(a.entry(name).dtype):
            continue
        if not a.digest(name) or a.digest(name) != b.digest(name):
            found = apart(session, pair, name)
            if found is not None and not found.error <= found.allowed:
                return True
    return False


def apart(session: Session, pair: RowPair, name: str) -> Apart | None:
    """How far a parameter's two sides are apart after a step; None where that cannot be said, or its inputs explain anything."""
    measured = row_distance(pair.a, pair.b, name)
    inputs = session.inputs.before(pair.step)
    tolerance = session.tolerance(pair, name)
    distance = 0.0 if inputs is None or parted(session, pair.step) else inputs.model
    if measured is None or distance > tolerance.bound:
        return None
    error, allowed = measured.rel_l2(), tolerance.at(distance)
    if measured.nonfinite >= 0:
        return Apart(float("inf"), allowed)
    if tolerance.explicit:
        return Apart(error, allowed)
    dtype = coarser(session.dtype, pair.dtype(name))
    if session.noise is not None:
        levels = [floor.level.of(name) for floor in session.noise.floors(pair.phase, pair.step)]
        if error <= session.policy.noise.factor(dtype) * max(levels, default=0.0):
            return Apart(error, allowed)
    moved = max(_moved(rows, row, name) for rows, row in ((session.a, pair.a), (session.b, pair.b)))
    if moved == 0.0:
        return Apart(error, allowed)
    replay = session.policy.replay(pair.dtype(name))
    rounding = replay.ulp * replay.eps * max(measured.a, measured.b) / moved
    return Apart(measured.diff / moved, allowed + rounding, "what training moved it by")


def _moved(rows: Rows, row: Row, name: str) -> float:
    """L2 norm of what training has moved a parameter by; 0 where its initial value was not recorded."""
    start = rows.get(Phase.INIT, 0)
    if start is None or name not in start.positions or start.shape(name) != row.shape(name):
        return 0.0
    measured = row_distance(start, row, name)
    return 0.0 if measured is None or measured.nonfinite >= 0 else measured.diff
