"""Compare an output of the clip or the optimizer across the two sides: where no known rule gives it on one of them."""

from __future__ import annotations

from differ.compare import distance
from differ.judges.model import allowance
from differ.session import RowPair, Session, value_finding
from tracer.names import split_state_name
from tracer.schema import Phase


def judge_across(session: Session, pair: RowPair, name: str) -> bool:
    """Judge one record against the other side's, as far as the inputs agree; returns whether it diverged."""
    parameter = split_state_name(name)[0] if pair.phase is Phase.OPT_STATE else name
    granted = allowance(session, pair, name, parameter=parameter)
    if session.model_blocked or session.step_blocked or not granted.judges:
        session.tally.explained(pair.phase)
        return False
    a, b = pair.a.read(name), pair.b.read(name)
    measured = distance(a, b)
    observed, allowed, apart = measured.rel_l2(), granted.error, granted.distance
    if observed <= allowed and measured.nonfinite < 0:
        session.measured(pair, name, observed, allowed, distance=apart)
        return False
    if not session.first_step_of(pair.phase, pair.step):
        session.tally.repeated(pair.phase, name)
        return True
    session.diverged_at.setdefault(pair.phase, pair.step)
    session.measured(pair, name, observed, allowed, distance=apart, diverged=True)
    session.tally.find(
        value_finding(pair, name, measured, (a, b), observed=observed, tolerance=allowed, required=observed)
    )
    return True


def waived(session: Session, pair: RowPair, name: str) -> bool:
    """Whether a user's own tolerance for this record lets it pass although a replay does not; counts it if so."""
    tolerance = session.tolerance(pair, name)
    if not tolerance.explicit:
        return False
    measured = distance(pair.a.read(name), pair.b.read(name))
    observed = measured.rel_l2()
    if observed > tolerance.base or measured.nonfinite >= 0:
        return False
    session.measured(pair, name, observed, tolerance.base)
    return True
