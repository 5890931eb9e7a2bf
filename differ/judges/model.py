"""Judge what the model computes: module outputs, losses, gradients, evaluations.

Their function is the model, which is not replayed here, so the two sides are compared with each other, and only as far
as their inputs agree: the tolerance grows with the distance of the parameters, and where the batch, the frozen weights
or the parameters are too far apart the difference is propagated.

    relative error of a tensor   |a - b| / max(|a|, |b|, 1e-6 * norm of the whole phase)
    relative error of a loss     |a - b| / max(|a|, |b|, 1): logits have rounding noise that a small loss does not shrink
    gradient noise               base / min(1, loss): p - 1 loses digits as the loss gets small

With noise files the tolerance is what the twins show, in proportion to the inputs up to `reach` times as far apart as theirs,
and only beyond that by `per_input`:

    ratio     distance of the inputs / distance of the twin's inputs
    allowed   max(base, safety * envelope * clamp(ratio, 1, reach)) + per_input * max(0, distance - reach * twin's distance)

for each twin, the largest of them: one file more never makes it smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from differ.compare import distance
from differ.inputs import InputDistance
from differ.judges.reduction import LOSS, reductions
from differ.noise import smallest_norm
from differ.policy import Tolerance
from differ.result import Cause
from differ.session import RowPair, Session, value_finding
from tracer.dtypes import coarser
from tracer.schema import Phase

# A loss below this is all rounding noise; the gradient's noise is not divided by less.
SMALLEST_LOSS: Final = 1e-6


def judge_model(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Compare outputs of the model across the two sides, given their inputs."""
    if session.model_blocked or session.step_blocked:
        session.tally.explained(pair.phase, len(names))
        return
    floor = noise_floor(pair)
    amplify = 1.0 / batch_loss(session, pair.step) if pair.phase is Phase.GRAD else 1.0
    repeats = not session.first_step_of(pair.phase, pair.step)
    diverged = False
    for name in names:
        if pair.phase is Phase.FORWARD and diverged:
            session.tally.explained(pair.phase)  # modules run in order: the rest got what this one made
            continue
        diverged |= _judge_one(session, pair, name, floor=floor, amplify=amplify, repeats=repeats)
    if diverged:
        session.diverged_at.setdefault(pair.phase, pair.step)
        session.step_blocked = session.step_blocked or pair.phase is not Phase.EVAL


def _judge_one(
    session: Session,
    pair: RowPair,
    name: str,
    *,
    floor: float,
    amplify: float,
    repeats: bool,
) -> bool:
    """Judge one record; returns whether it differs beyond tolerance."""
    granted = allowance(session, pair, name, amplify=amplify)
    if not granted.judges:
        session.tally.explained(pair.phase)
        return False
    allowed, apart = granted.error, granted.distance
    a, b = pair.a.read(name), pair.b.read(name)
    measured = distance(a, b)
    observed = measured.rel_l2(floor)
    if observed <= allowed and measured.nonfinite < 0:
        session.measured(pair, name, observed, allowed, distance=apart)
        return False
    if pair.phase is Phase.LOSS and name == LOSS and measured.nonfinite < 0:
        weighted = reductions(session, pair, allowed)
        if weighted is not None:
            session.note_once(Cause("loss.weighted", weighted.sentence, step=pair.step, phase=pair.phase.label))
            session.measured(pair, name, weighted.left, allowed, distance=apart)
            return False
    if repeats:
        session.tally.repeated(pair.phase, name)
        return True
    session.measured(pair, name, observed, allowed, distance=apart, diverged=True)
    session.tally.find(
        value_finding(pair, name, measured, (a, b), observed=observed, tolerance=allowed, required=observed)
    )
    return True


@dataclass(frozen=True, slots=True)
class Allowance:
    """Relative error that a record may have, the distance between its inputs, and whether these leave it to be judged."""

    error: float
    distance: float
    judges: bool


def allowance(session: Session, pair: RowPair, name: str, *, parameter: str = "", amplify: float = 1.0) -> Allowance:
    """What a record may differ by, given its inputs and the noise floor.

    `parameter`: that of an optimizer's state.  `amplify` is for `base`.  A user's own rule for the record knows better than
    any noise.
    """
    tolerance = session.tolerance(pair, name)
    # An evaluation comes after the update.
    inputs = session.inputs.before(pair.step + 1 if pair.phase is Phase.EVAL else pair.step)
    apart = input_distance(pair.phase, parameter or name, inputs, tolerance)
    noise = session.noise
    floors = [] if noise is None or tolerance.explicit else noise.floors(pair.phase, pair.step)
    if not floors:
        error = tolerance.at(apart) + (amplify - 1.0) * tolerance.base
        return Allowance(error, apart, apart <= tolerance.bound and error < 1.0)
    dtype = coarser(session.dtype, pair.dtype(name))
    each = []
    for floor in floors:
        theirs = input_distance(pair.phase, parameter or name, floor.inputs, tolerance)
        reach = session.policy.noise.reach
        ratio = min(max(apart / theirs, 1.0), reach) if inputs is not None and theirs > 0.0 else 1.0
        beyond = max(0.0, apart - reach * theirs) if inputs is not None else 0.0
        noise_error = session.policy.noise.factor(dtype) * floor.level.of(name) * ratio
        error = max(amplify * tolerance.base, noise_error) + tolerance.per_input * beyond
        each.append(Allowance(error, apart, beyond <= tolerance.bound and error < 1.0))
    return Allowance(max(one.error for one in each), apart, all(one.judges for one in each))


def input_distance(phase: Phase, name: str, inputs: InputDistance | None, tolerance: Tolerance) -> float:
    """Distance of a record's inputs; where the parameters were not recorded, the largest that is still judged."""
    if inputs is None:
        return tolerance.bound if math.isfinite(tolerance.bound) else 0.0
    return inputs.of_gradient(name) if phase in (Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE) else inputs.model


def noise_floor(pair: RowPair) -> float:
    """Norm below which a tensor of this row holds rounding noise only."""
    return smallest_norm(pair.phase, pair.a, pair.b)


def batch_loss(session: Session, step: int) -> float:
    """The smaller of the two sides' mean losses of a step, at most 1; 1 where none was recorded."""
    means = []
    for rows in (session.a, session.b):
        found = [rows.get(Phase.LOSS, step, m) for m in rows.trace.micro_batches(Phase.LOSS, step)]
        values = [row.scalar("loss") for row in found if row is not None]
        numbers = [abs(value) for value in values if value is not None and math.isfinite(value)]
        if numbers:
            means.append(sum(numbers) / len(numbers))
    return max(SMALLEST_LOSS, min([1.0, *means]))
