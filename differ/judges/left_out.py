"""What is left out of the judgement (`--phases`) explains nothing that is judged.

A record that follows from its own inputs on both sides differs because they do.  Where those inputs diverged in a phase that was
left out, nobody has said so: the difference is found here, at the first phase that is judged.  Every report that left phases out
names them, and where a divergence in them starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from differ.compare import Distance, distance
from differ.judges.model import allowance, batch_loss
from differ.judges.parted import CHAIN, apart, hidden
from differ.result import Cause, Finding
from differ.session import RowPair, Session, value_finding
from tracer.names import split_state_name
from tracer.schema import Phase

ID: Final = "phases.left_out"
# Of what is replayed: the phases that it comes from.
_FROM: Final = {Phase.CLIPPED_GRAD: (Phase.GRAD,), Phase.OPT_STATE: CHAIN, Phase.PARAM: CHAIN}


@dataclass(frozen=True, slots=True)
class _Found:
    """A record whose two sides are further apart than rounding makes them; `of`: what `error` is relative to."""

    measured: Distance
    error: float
    allowed: float
    of: str = ""


def settle(session: Session, pair: RowPair, margins: Mapping[str, float]) -> None:
    """Count records that follow from their own inputs on both sides, by the margin of the replay; find those whose inputs
    diverged in a phase that was left out.
    """
    found = _found(session, pair, tuple(margins))
    for name, margin in margins.items():
        if name not in found:
            session.measured(pair, name, margin, 1.0)
    if not found:
        return
    if not session.first_step_of(pair.phase, pair.step):
        for name in found:
            session.tally.repeated(pair.phase, name)
        return
    session.diverged_at.setdefault(pair.phase, pair.step)
    name = max(sorted(found), key=lambda one: found[one].error / found[one].allowed)
    worst = found[name]
    session.measured(pair, name, worst.error, worst.allowed, diverged=True)
    session.tally.explained(pair.phase, len(found) - 1)
    detail = "both sides follow from their own inputs, which diverged in a phase that was left out"
    session.tally.find(
        value_finding(
            pair, name, worst.measured, (pair.a.read(name), pair.b.read(name)), observed=worst.measured.rel_l2(),
            tolerance=worst.allowed, required=worst.error,
            detail=f"{detail}; {worst.error:.3g} of {worst.of} (tolerance {worst.allowed:.2g})" if worst.of else detail,
        )
    )  # fmt: skip


def _found(session: Session, pair: RowPair, names: tuple[str, ...]) -> dict[str, _Found]:
    if not session.options.wants_phase(pair.phase):
        return {}
    if hidden(session, _FROM[pair.phase], pair.phase, pair.step) is None:
        return {}
    judged = {name: _judge(session, pair, name) for name in names}
    return {name: one for name, one in judged.items() if one is not None}


def _judge(session: Session, pair: RowPair, name: str) -> _Found | None:
    measured = distance(pair.a.read(name), pair.b.read(name))
    if pair.phase is Phase.PARAM:
        moved = apart(session, pair, name)
        if moved is None or moved.error <= moved.allowed:
            return None
        return _Found(measured, moved.error, moved.allowed, moved.of)
    parameter = split_state_name(name)[0] if pair.phase is Phase.OPT_STATE else name
    granted = allowance(session, pair, name, parameter=parameter, amplify=1.0 / batch_loss(session, pair.step))
    error = measured.rel_l2()
    within = error <= granted.error and measured.nonfinite < 0
    return None if within or not granted.judges else _Found(measured, error, granted.error)


def note(session: Session) -> list[Cause]:
    """Say which phases were judged and which left out, and where a divergence in those starts; nothing if none was."""
    recorded = {*session.a.trace.phases, *session.b.trace.phases} - {Phase.CONFIG}
    judged = [phase.label for phase in sorted(recorded) if session.options.wants_phase(phase)]
    left_out = [phase.label for phase in sorted(recorded) if not session.options.wants_phase(phase)]
    if not left_out:
        return []
    summary = f"judged: {', '.join(judged) or 'nothing'}; left out: {', '.join(left_out)}"
    known = session.tally.hidden
    first = min(known.values(), key=lambda found: (found.step, Phase.parse(found.phase)), default=None)
    if first is not None:
        summary += f", where a and b diverge: {_address(first)}"
    parameters = {"judged": judged, "left_out": left_out, "diverged": first is not None}
    step, phase = (None, None) if first is None else (first.step, first.phase)
    return [Cause(ID, summary, step=step, phase=phase, parameters=parameters)]


def _address(finding: Finding) -> str:
    name = "" if finding.name is None else f", {finding.name}"
    return f"step {finding.step}, {finding.phase}{name}"
