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
from typing import TYPE_CHECKING, Final

import numpy as np

from differ.align import Tensor
from differ.compare import Distance, distance
from differ.floors import delta_norm, smallest_norm
from differ.inputs import InputDistance
from differ.judges.loss import LOSS, replays
from differ.judges.parted import parted
from differ.judges.systematic import excused
from differ.policy import Tolerance
from differ.result import Cause
from differ.session import RowPair, Session, value_finding
from tracer.dtypes import coarser, to_float64
from tracer.schema import TOKEN_LOSS, Phase

if TYPE_CHECKING:
    from differ.judges.reference import Teacher

# A loss below this is all rounding noise; the gradient's noise is not divided by less.
SMALLEST_LOSS: Final = 1e-6


def judge_model(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Compare outputs of the model across the two sides, given their inputs."""
    blocked = session.model_blocked or session.step_blocked
    if blocked and session.options.reference is None:
        session.tally.explained(pair.phase, len(names))
        return
    floor = noise_floor(pair)
    amplify = 1.0 / batch_loss(session, pair.step) if pair.phase is Phase.GRAD else 1.0
    repeats = not session.first_step_of(pair.phase, pair.step)
    if not (blocked or repeats):
        small = excused(session, pair, names, lambda name: allowance(session, pair, name, amplify=amplify), floor)
        names = [name for name in names if name not in small]
    diverged = False
    # Of a micro-batch's losses those of the tokens come first: the reduced one is made of them.
    for name in sorted(names, key=lambda name: name != TOKEN_LOSS) if pair.phase is Phase.LOSS else names:
        if pair.phase in (Phase.FORWARD, Phase.LOSS) and diverged:
            session.tally.explained(pair.phase)  # modules run in order: the rest got what this one made
            continue
        diverged |= _judge_one(session, pair, name, floor=floor, amplify=amplify, repeats=repeats, blocked=blocked)
    if diverged:
        session.diverged_at.setdefault(pair.phase, pair.step)
        if pair.phase is not Phase.EVAL:
            session.block_step(pair.phase)


def _judge_one(
    session: Session,
    pair: RowPair,
    name: str,
    *,
    floor: float,
    amplify: float,
    repeats: bool,
    blocked: bool,
) -> bool:
    """Judge one record; returns whether it differs beyond tolerance.

    Where the inputs say too little (`blocked`, or too far apart) only the reference can judge, if there is one.
    """
    granted = allowance(session, pair, name, amplify=amplify)
    taught = _teacher(session, pair, name)
    if blocked or not granted.judges:
        if taught is None or not taught.news:
            session.tally.explained(pair.phase)
            return False
        return _find_taught(session, pair, name, taught, repeats=repeats)
    allowed, apart = granted.error, granted.distance
    a, b = _unweighted(session, pair, name)
    measured = distance(a, b)
    observed = measured.rel_l2(max(floor, delta_norm(pair.phase, pair.a, pair.b, name)))
    within = observed <= allowed and measured.nonfinite < 0
    # A user's own rule decides where a replay would.
    replayed = pair.phase is Phase.LOSS and name == LOSS and not (within and session.tolerance(pair, name).explicit)
    if replayed and _find_irreproducible(session, pair, repeats=repeats):
        return True
    if within:
        session.measured(pair, name, observed, allowed, distance=apart)
        return False
    if taught is not None and taught.excused:
        session.tally.explained(pair.phase)
        return False
    if pair.phase is Phase.LOSS and name == LOSS and measured.nonfinite < 0:
        from differ.judges.reduction import reductions

        weighted = reductions(session, pair, allowed)
        if weighted is not None:
            session.loss_weights[pair.step] = weighted.weights
            session.note_once(Cause("loss.weighted", weighted.sentence, step=pair.step, phase=pair.phase.label))
            session.measured(pair, name, weighted.left, allowed, distance=apart)
            return False
    if repeats:
        session.tally.repeated(pair.phase, name)
        return True
    session.measured(pair, name, observed, allowed, distance=apart, diverged=True)
    detail = _detail(session, pair, name, (a, b), measured) if taught is None else taught.detail
    session.tally.find(
        value_finding(
            pair, name, measured, (a, b), observed=observed, tolerance=allowed, required=observed, detail=detail
        )
    )
    return True


def _teacher(session: Session, pair: RowPair, name: str) -> Teacher | None:
    """What the reference says of a record, if there is one."""
    if session.options.reference is None:
        return None
    from differ.judges.reference import teacher

    return teacher(session, pair, name)


def _unweighted(session: Session, pair: RowPair, name: str) -> tuple[Tensor, Tensor]:
    """Both sides of a record; gradients of a micro-batch without the weights that their losses were found to have."""
    a, b = pair.a.read(name), pair.b.read(name)
    weights = session.loss_weights.get(pair.step, {}).get(pair.micro_batch)
    if pair.phase is not Phase.GRAD or weights is None:
        return a, b
    return _divided(a, weights[0]), _divided(b, weights[1])


def _divided(tensor: Tensor, weight: float) -> Tensor:
    return Tensor(to_float64(tensor.stored, tensor.dtype) / weight, "float64")


def _find_irreproducible(session: Session, pair: RowPair, *, repeats: bool) -> bool:
    """Report a loss that follows from its own side's token losses under no known reduction, where the other side's does."""
    found = replays(session, pair)
    if found is None:
        return False
    for side, replay in (("a", found.a), ("b", found.b)):
        if replay is not None and not replay.rules and not found.odd:
            summary = (
                f"{side}'s loss follows from its token losses under no known reduction: it is compared across the sides"
            )
            session.note_once(Cause("rule.unknown", summary, side=side, step=pair.step, phase=pair.phase.label))
    odd = {"a": found.a, "b": found.b}.get(found.odd)
    if odd is None:
        return False
    if repeats:
        session.tally.repeated(pair.phase, LOSS)
        return True
    a, b = pair.a.read(LOSS), pair.b.read(LOSS)
    measured = distance(a, b)
    session.measured(pair, LOSS, odd.error, odd.tolerance, diverged=True)
    session.tally.find(
        value_finding(
            pair, LOSS, measured, (a, b), observed=measured.rel_l2(), tolerance=odd.tolerance,
            required=odd.error, detail=found.sentence,
        )
    )  # fmt: skip
    return True


def _detail(session: Session, pair: RowPair, name: str, tensors: tuple[Tensor, Tensor], measured: Distance) -> str:
    """What the numbers of a finding do not say: which token it is, where one is supervised on one side only, how losses were
    reduced.
    """
    if pair.phase is Phase.FORWARD:
        from differ.matching import positions_of

        positions = positions_of(pair.a)
        if positions is None or not len(positions) or tensors[0].shape[:1] != (len(positions),) or not tensors[0].size:
            return ""
        width = tensors[0].size // len(positions)
        row, position = positions[(measured.nonfinite if measured.nonfinite >= 0 else measured.at) // width]
        return f"row {row} of the batch, position {position}"
    if pair.phase is Phase.LOSS and name == LOSS:
        found = replays(session, pair)
        return "" if found is None else found.sentence
    if name != TOKEN_LOSS:
        return ""
    zeros = [tensor.stored.reshape(tensor.shape) == 0 for tensor in tensors]
    only = np.argwhere(zeros[0] != zeros[1])
    if not len(only):
        return ""
    places = ", ".join(f"({row}, {position})" for row, position in only[:3]) + ", …" * (len(only) > 3)
    return f"{len(only)} tokens have a loss on one side only: {places} (row, position)"


def _find_taught(session: Session, pair: RowPair, name: str, taught: Teacher, *, repeats: bool) -> bool:
    """Report a record that the reference alone could judge: its numbers are distances from the reference."""
    if repeats:
        session.tally.repeated(pair.phase, name)
        return True
    session.measured(pair, name, taught.error, taught.tolerance, diverged=True)
    tensors = pair.a.read(name), pair.b.read(name)
    measured = distance(*tensors)
    session.tally.find(
        value_finding(
            pair, name, measured, tensors, observed=measured.rel_l2(), tolerance=taught.tolerance,
            required=taught.error, detail=taught.detail,
        )
    )  # fmt: skip
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
    start = pair.step + 1 if pair.phase is Phase.EVAL else pair.step
    inputs = session.inputs.before(start)
    # Parameters that something left out of the judgement moved apart excuse nothing.
    apart = 0.0 if parted(session, start) else input_distance(pair.phase, parameter or name, inputs, tolerance)
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
