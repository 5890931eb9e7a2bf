"""Judge records of which a side holds a sketch only (`trace shrink`): equal bits by digest, else an estimated distance.

    allowed   1.5 * the tolerance that the same record would have, and at least 1e-6: an estimate is off by some 15 %
    estimate  |sketch(a) - sketch(b)| / max(|a|, |b|), norms from the recorded statistics

Nothing is replayed from a sketch, so clipping and the optimizer are compared across the two sides, as far as the gradients
and the settings agree: what follows from a divergence that was found before is propagated.  The engine's notes say that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from differ.compare import Distance
from differ.estimate import has_sketch, is_trainable, row_distance
from differ.floors import delta_norm
from differ.judges.model import allowance, batch_loss, noise_floor
from differ.result import Cause, Finding, Kind
from differ.session import RowPair, Session
from tracer.dtypes import is_float
from tracer.names import split_state_name
from tracer.schema import Phase
from tracer.sketch import FLOOR

# An estimate of 61 buckets is within 0.85 to 1.15 of the truth in nine of ten cases: docs/fingerprints.md.
SLACK: Final = 1.5
# Phases whose function is the model, and those that are replayed where there are tensors.
MODEL: Final = (Phase.FORWARD, Phase.LOSS, Phase.GRAD, Phase.EVAL)
REPLAYED: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)

# Among the keys that the session has seen: moments hold what diverged at an earlier step.
_REMEMBERED: Final = ("fingerprint", "remembered")


def note_fingerprints(session: Session) -> None:
    """Say once, for each side that is a fingerprint, what this comparison cannot see."""
    traces = {"a": session.a.trace, "b": session.b.trace}
    sides = [side for side, trace in traces.items() if trace.fingerprint]
    if not sides:
        return
    who = f"{' and '.join(sides)} {'are fingerprints' if len(sides) > 1 else 'is a fingerprint'} without tensors"
    if any(len(traces[side].sketched_steps) < len(traces[side].steps) - 1 for side in sides):
        thinned = sorted({step for side in sides for step in traces[side].sketched_steps})
        who = f"at {len(thinned)} steps from {thinned[0]} on there are sketches in place of tensors"
    side = sides[0] if len(sides) == 1 else None
    sizes = (
        f"{who}: differences are estimated, within some 15 %, against {SLACK} times the tolerance; "
        f"not seen are those below {FLOOR:g} of a tensor's norm, nor which element differs"
    )
    causes = (
        "no clip or optimizer rule can be replayed without tensors: these phases are compared across the sides, later "
        "independent divergences may be missed, and only causes in settings, names, batches and losses are found"
    )
    session.note_once(Cause("fingerprint.sizes", sizes, side=side))
    session.note_once(Cause("fingerprint.causes", causes, side=side))


def sketched_names(pair: RowPair, names: Sequence[str]) -> list[str]:
    """Those of the differing records that can only be judged by estimate.

    In phases that are replayed one sketch takes the row's floats with it: a rule cannot be fitted to a part of the row.
    """
    sketched = [name for name in names if has_sketch(pair.a, name) or has_sketch(pair.b, name)]
    if not sketched or pair.phase not in REPLAYED:
        return sketched
    return [name for name in names if is_float(pair.a.entry(name).dtype)]


def judge_sketched(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Judge records whose digests differ; each is counted exactly once."""
    if pair.phase in (*MODEL, *REPLAYED) and _is_explained(session, pair.phase):
        session.tally.explained(pair.phase, len(names))
        return
    repeats = not session.first_step_of(pair.phase, pair.step)
    diverged = False
    for name in names:
        diverged |= _judge_one(session, pair, name, repeats=repeats)
    if diverged and pair.phase not in (Phase.INIT, Phase.HPARAMS):
        session.diverged_at.setdefault(pair.phase, pair.step)
        if pair.phase is not Phase.EVAL:
            session.block_step(pair.phase)


def _is_explained(session: Session, phase: Phase) -> bool:
    """Whether something upstream diverged: the model, this step, or what the optimizer works by or remembers."""
    if session.model_blocked or session.step_blocked:
        if phase in REPLAYED:
            session.seen.add(_REMEMBERED)
        return True
    optimizer = phase in (Phase.OPT_STATE, Phase.PARAM)
    settings = session.options.wants_phase(Phase.HPARAMS) and any(key[0] is Phase.HPARAMS for key in session.seen)
    return optimizer and (_REMEMBERED in session.seen or settings)


def _judge_one(session: Session, pair: RowPair, name: str, *, repeats: bool) -> bool:
    """Judge one record; returns whether it diverged."""
    if pair.phase is Phase.INIT and is_trainable(pair.a, name) != is_trainable(pair.b, name):
        return _find_untrained(session, pair, name)
    measured = row_distance(pair.a, pair.b, name)
    if measured is None:
        summary = f"{name} of {pair.phase.label} has no sketch in this layout (a name rule transposes it): not compared"
        session.note_once(Cause("fingerprint.layout", summary, step=pair.step, phase=pair.phase.label))
        session.tally.left_out(pair.phase)
        return False
    allowed, apart, floor = _allowed(session, pair, name)
    if allowed is None:
        session.tally.explained(pair.phase)
        return False
    observed = measured.rel_l2(floor)
    if observed <= allowed and measured.nonfinite < 0:
        session.measured(pair, name, observed, allowed, distance=apart)
        return False
    if repeats or (pair.phase is Phase.BATCH and not session.first_time(pair.phase, name)):
        session.tally.repeated(pair.phase, name)
        return True
    session.measured(pair, name, observed, allowed, distance=apart, diverged=True)
    session.tally.find(_finding(pair, name, measured, observed, allowed))
    return True


def _allowed(session: Session, pair: RowPair, name: str) -> tuple[float | None, float, float]:
    """Allowed estimate (None: the inputs explain any difference), distance of the inputs, floor of the norm."""
    tolerance = session.tolerance(pair, name)
    if pair.phase is Phase.INIT:
        return max(SLACK * session.policy.tolerance(pair.phase, pair.dtype(name), name).base, FLOOR), 0.0, 0.0
    if pair.phase in (Phase.HPARAMS, Phase.BATCH):
        # Other bits of one dtype are other numbers; between two dtypes only the estimate can tell.
        same = pair.a.entry(name).dtype == pair.b.entry(name).dtype
        return (0.0 if same and tolerance.base == 0.0 else max(SLACK * tolerance.base, FLOOR)), 0.0, 0.0
    parameter = split_state_name(name)[0] if pair.phase is Phase.OPT_STATE else name
    amplify = 1.0 / batch_loss(session, pair.step) if pair.phase is Phase.GRAD else 1.0
    granted = allowance(session, pair, name, parameter=parameter, amplify=amplify)
    floor = max(noise_floor(pair), delta_norm(pair.phase, pair.a, pair.b, name)) if pair.phase in MODEL else 0.0
    allowed = max(SLACK * granted.error, FLOOR) if granted.judges else None
    return allowed, granted.distance, floor


def _find_untrained(session: Session, pair: RowPair, name: str) -> bool:
    """A parameter that one side trains and the other holds frozen."""
    words = ["trainable" if is_trainable(row, name) else "frozen" for row in (pair.a, pair.b)]
    session.block_model(pair.phase)
    session.measured(pair, name, 1.0, 0.0, diverged=True)
    session.tally.find(
        Finding(
            pair.step, pair.phase.label, name, Kind.STATE, a=words[0], b=words[1], detail="trained on one side only"
        )
    )
    return True


def _finding(pair: RowPair, name: str, measured: Distance, observed: float, allowed: float) -> Finding:
    odd = measured.nonfinite >= 0
    return Finding(
        pair.step,
        pair.phase.label,
        name,
        Kind.NONFINITE if odd else Kind.VALUE,
        pair.shown_micro_batch,
        rel_l2=observed,
        tolerance=allowed,
        required=None if odd or not math.isfinite(observed) else observed,
        detail=f"estimated from sketches; l2 {measured.a:.6g} and {measured.b:.6g}",
    )
