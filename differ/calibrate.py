"""Fit tolerances to a run's twins, and say by leave-one-out how often they would have been wrong.

Each record of each twin is a point: its distance from the run, and the distance of its inputs.  Per phase and dtype

    base        safety * largest distance where the inputs are no further apart than at the start, one rounding unit
    per_input   safety * largest (distance - that maximum) / distance of the inputs, elsewhere
    bound       safety * largest distance of the inputs

rounded up to two digits.  `clipped_grad`, `opt_state` and `param` are judged across the sides only where no rule replays
them; an optimizer turns noise into noise whatever its inputs' distance, so their `base` covers every point and `per_input` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from differ.align import Rows
from differ.inputs import Inputs
from differ.judges.model import input_distance
from differ.noise import row_distances
from differ.policy import Tolerance, default_policy
from differ.runs import model_dtype
from differ.twins import HINT, other_course, other_kind, other_start
from tracer.dtypes import coarser
from tracer.errors import BadUsage
from tracer.names import split_state_name
from tracer.reader import Trace
from tracer.schema import Phase

# Judged by the distance of their inputs, and those for which that says nothing.
MODEL = (Phase.FORWARD, Phase.LOSS, Phase.GRAD, Phase.EVAL)
ACROSS = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)

# A table of a policy file: phase and dtype.
Key = tuple[Phase, str]


@dataclass(frozen=True, slots=True)
class Point:
    """One record of one twin: relative error, how far apart its inputs were, and whether it is of the first step."""

    error: float
    inputs: float
    first: bool


Points = Mapping[Key, Sequence[Point]]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What tolerances fitted to the other twins say of one twin: records of the model's phases that are judged, judged
    wrongly, and not judged because the inputs explain anything.
    """

    name: str
    judged: int
    alarms: int
    unjudged: int

    @property
    def rate(self) -> float:
        """False alarms per judged record; nan where none was judged."""
        return self.alarms / self.judged if self.judged else math.nan


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tolerances, the points they rest on, and their leave-one-out check."""

    tolerances: Mapping[Key, Tolerance]
    points: Mapping[Key, int]
    checks: tuple[LeftOut, ...]


def calibrate(run: Trace, twins: Sequence[Trace], safety: float | None) -> Calibration:
    """Tolerances that every twin passes by the safety factor.  Raises BadUsage for a file that is no twin of the run."""
    if len(twins) < 2:
        raise BadUsage("one twin cannot be left out", "give two or more: trace record --twins 3 -o run.h5 …")
    each = [measure(run, twin) for twin in twins]
    tolerances = fit(each, safety)
    checks = tuple(
        _left_out(twin.path.name, points, fit([other for other in each if other is not points], safety))
        for twin, points in zip(twins, each, strict=True)
    )
    return Calibration(tolerances, {key: sum(len(p.get(key, ())) for p in each) for key in tolerances}, checks)


def measure(run: Trace, twin: Trace) -> Points:
    """All points of one twin."""
    rows, side = Rows(twin), Rows(run)
    _refuse(rows, side, other_kind(twin, run) or other_start(rows, side))
    inputs, dtype = Inputs(rows, side), model_dtype(run)
    points: dict[Key, list[Point]] = {}
    first = min((step for step in run.steps if step > 0), default=0)
    for step in (step for step in run.steps if step > 0):
        _refuse(rows, side, other_course(rows, side, step))
        for phase in (*MODEL, *ACROSS):
            before = inputs.before(step + 1 if phase is Phase.EVAL else step)
            for name, error in row_distances(rows, side, phase, step).items():
                row = side.get(phase, step, run.micro_batches(phase, step)[0])
                own = row.entry(name).dtype if row is not None and name in row.positions else dtype
                parameter = split_state_name(name)[0] if phase is Phase.OPT_STATE else name
                apart = input_distance(phase, parameter, before, Tolerance(0.0))
                points.setdefault((phase, coarser(dtype, own)), []).append(Point(error, apart, step == first))
    return points


def _refuse(twin: Rows, side: Rows, reason: str) -> None:
    if reason:
        raise BadUsage(f"{twin.trace.path} is no twin of {side.trace.path}: {reason}", HINT)


def fit(twins: Iterable[Points], safety: float | None) -> dict[Key, Tolerance]:
    """Tolerances of all tables that some twin has noise in; `safety` None is that of the dtype."""
    joined: dict[Key, list[Point]] = {}
    for points in twins:
        for key, some in points.items():
            joined.setdefault(key, []).extend(some)
    fitted = {
        key: _fit(points, default_policy().noise.factor(key[1]) if safety is None else safety, flat=key[0] in ACROSS)
        for key, points in sorted(joined.items())
    }
    return {key: tolerance for key, tolerance in fitted.items() if tolerance.at(tolerance.bound) > 0.0}


def _fit(points: Sequence[Point], safety: float, *, flat: bool) -> Tolerance:
    bound = round_up(safety * max(point.inputs for point in points))
    if flat:
        return Tolerance(round_up(safety * max(point.error for point in points)), 0.0, bound)
    start = max((point.inputs for point in points if point.first), default=0.0)
    base = max((point.error for point in points if point.inputs <= start), default=0.0)
    slope = max([0.0, *((p.error - base) / p.inputs for p in points if p.inputs > start)])
    return Tolerance(round_up(safety * base), round_up(safety * slope), bound)


def round_up(value: float) -> float:
    """The next number with two significant digits; 0 stays 0."""
    if not 0.0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.1e}")


def _left_out(name: str, points: Points, tolerances: Mapping[Key, Tolerance]) -> LeftOut:
    judged = alarms = unjudged = 0
    model = {key: some for key, some in points.items() if key[0] in MODEL}
    for key, point in ((key, point) for key, some in model.items() for point in some):
        tolerance = tolerances.get(key, Tolerance(0.0))
        if not tolerance.judges(point.inputs):
            unjudged += 1
        else:
            judged += 1
            alarms += point.error > tolerance.at(point.inputs)
    return LeftOut(name, judged, alarms, unjudged)


def policy_text(found: Calibration, how: Sequence[str], comment: Callable[[Key], str]) -> str:
    """A policy file: comment lines, then a table per phase and dtype."""
    lines = [f"# {line}" for line in how]
    for key, tolerance in found.tolerances.items():
        lines += ["", f"[{key[0].label}.{key[1]}]  # {comment(key)}", f"base = {tolerance.base:g}"]
        lines += [f"per_input = {tolerance.per_input:g}", f"bound = {tolerance.bound:g}"]
    return "\n".join(lines) + "\n"
