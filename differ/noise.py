"""The noise floor: how far a run is from its twin, record by record, and what two runs may therefore differ by.

    e(phase, name, step)    distance of a twin from the run that it is a twin of, in the judges' own metric, the largest of
                            its micro-batches
    own envelope            max of e over the steps so far
    family envelope         a high quantile of the own envelopes of all lora_A, of all lora_B, of all others in the phase,
                            so that a name which came out near by luck is not judged by its luck
    envelope                max(own, family): never falls with the step

A noise file that is no twin of either side is refused, by its data: it must start within rounding of that side, train on
the same batches and with the same settings.  Read in step with the comparison, one record of each file in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from differ.align import Row, Rows
from differ.estimate import is_trainable, row_distance
from differ.inputs import LORA_A, LORA_B, LORA_SCALE, InputDistance, Inputs, parameters_before
from differ.runs import label, model_dtype
from tracer.dtypes import EPSILON
from tracer.errors import BadUsage
from tracer.reader import Trace
from tracer.schema import RNG_PREFIX, Phase, State
from tracer.sketch import FLOOR

# Tensors smaller than this share of the phase's norm hold noise only.
NOISE_SHARE: Final = 1e-6
LOSS_FLOOR: Final = 1.0
# A twin starts this many rounding units away at most; a frozen weight is known by its norm only.
ROUNDING_UNITS: Final = 4.0
FROZEN_NORM: Final = 2e-2
# What the twin is, and how it was computed: these may differ between a twin and its run.
_FREE: Final = ("twin", "compiled", "framework.version")


@dataclass(frozen=True, slots=True)
class Level:
    """Noise of one phase at one step as one twin shows it: by name, and by family for every other name."""

    own: Mapping[str, float]
    family: Mapping[str, float]

    def of(self, name: str) -> float:
        """The envelope of a record."""
        return max(self.own.get(name, 0.0), self.family.get(family(name), 0.0))


@dataclass(frozen=True, slots=True)
class Floor:
    """What one twin says about one phase at one step: its noise, and how far apart its inputs were by then."""

    level: Level
    inputs: InputDistance


@dataclass(slots=True)
class Envelope:
    """Largest distance of every name so far; grows only."""

    quantile: float
    _largest: dict[str, float] = field(default_factory=dict)

    def grow(self, distances: Mapping[str, float]) -> None:
        """Take in the distances of one more step."""
        for name, value in distances.items():
            self._largest[name] = max(self._largest.get(name, 0.0), value)

    def level(self) -> Level:
        """The envelope as it is now."""
        families: dict[str, list[float]] = {}
        for name, value in self._largest.items():
            families.setdefault(family(name), []).append(value)
        # "higher": a value that was measured, and the largest where there are few.
        high = {key: float(np.quantile(values, self.quantile, method="higher")) for key, values in families.items()}
        return Level(dict(self._largest), high)


def family(name: str) -> str:
    """Records whose noise is alike: the factors of LoRA, and everything else."""
    return next((factor for factor in (LORA_A, LORA_B) if name.endswith(factor)), "")


def smallest_norm(phase: Phase, a: Row, b: Row) -> float:
    """Norm below which a tensor of this row holds rounding noise only; the floor of every relative error."""
    if phase is not Phase.GRAD:
        return LOSS_FLOOR if phase in (Phase.LOSS, Phase.EVAL) else 0.0
    return NOISE_SHARE * max(math.hypot(*(float(l2) for l2 in row.view.stats[:, 0])) for row in (a, b))


class NoiseFloor:
    """The twins of one comparison.  `floors` answers for a phase and a step, in any order."""

    def __init__(self, twins: Sequence[Rows], a: Rows, b: Rows, quantile: float) -> None:
        self._twins = [_Twin(rows, sides_of(rows, a, b), quantile) for rows in twins]

    def floors(self, phase: Phase, step: int) -> list[Floor]:
        """Floors of the twins that tell anything about this phase at this step."""
        return [floor for twin in self._twins if (floor := twin.floor(phase, step)) is not None]

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Id and sentence of what is to be said about the noise files: those that measure nothing, or end early."""
        for twin in self._twins:
            name = twin.rows.trace.path.name
            if twin.silent:
                yield (
                    "noise.silent",
                    f"{name} is the same to the bit as the run that it is a twin of: it measures no noise",
                )
            elif twin.rows.trace.last_step < max(side.trace.last_step for side in twin.sides):
                yield (
                    "noise.short",
                    f"{name} ends after step {twin.rows.trace.last_step}; its last floor holds from there on",
                )


class _Twin:
    """One noise file and the side, or both sides, that it is a twin of."""

    def __init__(self, rows: Rows, sides: tuple[Rows, ...], quantile: float) -> None:
        self.rows = rows
        self.sides = sides
        self._quantile = quantile
        self._inputs = [Inputs(rows, side) for side in sides]
        self._floors: dict[tuple[Phase, int], Floor | None] = {}
        self._envelopes: dict[Phase, Envelope] = {}
        self._moved: dict[int, InputDistance] = {0: InputDistance(0.0, {})}
        self._parameters = Envelope(quantile)

    @property
    def silent(self) -> bool:
        """Whether no tensor differs from a side's in its bits."""
        phases = (Phase.INIT, Phase.FORWARD, Phase.LOSS, Phase.GRAD, Phase.PARAM)
        return any(all(_seals(self.rows, phase) == _seals(side, phase) for phase in phases) for side in self.sides)

    def floor(self, phase: Phase, step: int) -> Floor | None:
        """Floor of a phase at a step; None where the twin is the run to the bit, or did not record the phase."""
        last = max((known for at, known in self._floors if at is phase), default=0)
        for following in range(last + 1, step + 1):
            self._floors[phase, following] = self._next(phase, following)
        return self._floors.get((phase, step))

    def _next(self, phase: Phase, step: int) -> Floor | None:
        check_same_course(self.rows, self.sides, step)
        envelope = self._envelopes.setdefault(phase, Envelope(self._quantile))
        envelope.grow(self._distances(phase, step))
        level, inputs = envelope.level(), self._inputs_before(step + 1 if phase is Phase.EVAL else step)
        still = not any(level.own.values()) and inputs.model == 0.0 and not any(inputs.own.values())
        return None if still else Floor(level, inputs)

    def _distances(self, phase: Phase, step: int) -> dict[str, float]:
        """Distance of every record of a step; from the nearer side where it is a twin of both."""
        found = [_row_distances(self.rows, side, phase, step) for side in self.sides]
        return {name: min(each[name] for each in found) for name in found[0] if all(name in each for each in found)}

    def _inputs_before(self, step: int) -> InputDistance:
        """Envelope of the distance between the parameters that a step starts from."""
        for following in range(max(self._moved) + 1, step + 1):
            before = self._moved[following - 1]
            measured = [found for inputs in self._inputs if (found := inputs.before(following)) is not None]
            if measured:
                row = parameters_before(self.rows, following)
                names = row.positions if row is not None else ()
                self._parameters.grow({name: min(each.own.get(name, 0.0) for each in measured) for name in names})
            level, model = self._parameters.level(), min((each.model for each in measured), default=0.0)
            self._moved[following] = InputDistance(max(before.model, model), {n: level.of(n) for n in level.own})
        return self._moved[step]


def _seals(rows: Rows, phase: Phase) -> list[tuple[int, int, bytes]]:
    return [(row.step, row.micro_batch, row.seal) for row in rows.trace.rows(phase)]


def _row_distances(twin: Rows, side: Rows, phase: Phase, step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for micro_batch in twin.trace.micro_batches(phase, step):
        a, b = twin.get(phase, step, micro_batch), side.get(phase, step, micro_batch)
        if a is None or b is None:
            continue
        floor = smallest_norm(phase, a, b)
        for name in a.positions:
            if _comparable(a, b, name):
                found[name] = max(found.get(name, 0.0), _distance(a, b, name, floor))
    return found


def _comparable(a: Row, b: Row, name: str) -> bool:
    if name not in b.positions or a.shape(name) != b.shape(name):
        return False
    return all(row.state(name) in (State.VALUE, State.ZERO) for row in (a, b)) and a.entry(name).dtype in EPSILON


def _distance(a: Row, b: Row, name: str, floor: float) -> float:
    if a.digest(name) and a.digest(name) == b.digest(name):
        return 0.0
    measured = row_distance(a, b, name)
    if measured is None:
        return 0.0
    error = measured.rel_l2(floor)
    return error if not math.isnan(error) else math.inf


# Which side a noise file belongs to.


def sides_of(twin: Rows, a: Rows, b: Rows) -> tuple[Rows, ...]:
    """The side that a noise file is a twin of; both where nothing tells them apart.  Raises BadUsage if it is none's."""
    reasons = {side: why_no_twin(twin, rows) for side, rows in (("a", a), ("b", b))}
    fitting = [rows for side, rows in (("a", a), ("b", b)) if not reasons[side]]
    if not fitting:
        said = "; ".join(f"of {side}: {reason}" for side, reason in reasons.items())
        raise BadUsage(f"{twin.trace.path} is a twin of neither side ({said})", "record it with `trace record --twin`")
    near = {id(rows): (_other_settings(twin.trace, rows.trace), _start_distance(twin, rows)) for rows in fitting}
    best = min(near.values())
    return tuple(rows for rows in fitting if near[id(rows)] == best)


def why_no_twin(twin: Rows, side: Rows) -> str:
    """Why a noise file cannot be a twin of a run, an empty string if it can."""
    if label(twin.trace) != label(side.trace) and not {twin.trace.path.stem, side.trace.path.stem} & {
        label(twin.trace),
        label(side.trace),
    }:
        return f"it is a run of {label(twin.trace)}, not of {label(side.trace)}"
    if model_dtype(twin.trace) != model_dtype(side.trace):
        return f"its model is {model_dtype(twin.trace)}, not {model_dtype(side.trace)}"
    mine, theirs = twin.get(Phase.INIT, 0), side.get(Phase.INIT, 0)
    if mine is None or theirs is None:
        return "the state before training was not recorded"
    return _other_start(mine, theirs)


def _other_start(mine: Row, theirs: Row) -> str:
    if {n for n in mine.positions if is_trainable(mine, n)} != {n for n in theirs.positions if is_trainable(theirs, n)}:
        return "other parameters are trained"
    for name in mine.positions:
        if name.startswith(RNG_PREFIX) or name not in theirs.positions or _same(mine, theirs, name):
            continue
        if name.endswith(LORA_SCALE) or mine.shape(name) != theirs.shape(name):
            return f"{name} is another one"
        if is_trainable(mine, name):
            measured = row_distance(mine, theirs, name)
            units = ROUNDING_UNITS * EPSILON.get(mine.entry(name).dtype, 0.0)
            if measured is None or not measured.rel_l2() <= max(units, FLOOR):
                return f"{name} starts further away than by rounding"
        elif abs(mine.l2(name) - theirs.l2(name)) > FROZEN_NORM * max(mine.l2(name), theirs.l2(name)):
            return f"{name} is another weight"
    return ""


def _same(a: Row, b: Row, name: str) -> bool:
    return bool(a.digest(name)) and a.digest(name) == b.digest(name)


def check_same_course(twin: Rows, sides: Sequence[Rows], step: int) -> None:
    """Raise BadUsage where a twin was fed another batch, or trained with other settings, than its run."""
    for side in sides:
        for phase in (Phase.HPARAMS, Phase.BATCH):
            for micro_batch in twin.trace.micro_batches(phase, step):
                mine, theirs = twin.get(phase, step, micro_batch), side.get(phase, step, micro_batch)
                if mine is None or theirs is None or mine.view.seal == theirs.view.seal:
                    continue
                shared = [n for n in mine.positions if n in theirs.positions and not n.startswith(RNG_PREFIX)]
                other = next((name for name in shared if not _same(mine, theirs, name)), None)
                if other is not None:
                    raise BadUsage(
                        f"{twin.trace.path} is no twin of {side.trace.path}: {phase.label} {other} differs at step {step}",
                        "a twin is the same run, moved by rounding only",
                    )


def _other_settings(twin: Trace, side: Trace) -> int:
    """How many settings differ that a twin shares with its run."""
    count = 0
    for mine, theirs in ((twin.declared, side.declared), (twin.observed, side.observed)):
        keys = {key for key in (*mine, *theirs) if not key.startswith(_FREE)}
        count += sum(mine.get(key) != theirs.get(key) for key in keys)
    return count


def _start_distance(twin: Rows, side: Rows) -> float:
    """Distance between the starting points, all trained parameters together."""
    start = Inputs(twin, side).before(1)
    return math.inf if start is None else math.hypot(*start.own.values()) if start.own else 0.0
