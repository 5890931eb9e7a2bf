"""The noise floor: how far a run is from its twin, record by record, and what two runs may therefore differ by.

    e(phase, name, step)    distance of a twin from the run that it is a twin of, in the judges' own metric, the largest of
                            its micro-batches
    own envelope            max of e over the steps so far
    family envelope         a high quantile of the own envelopes of all lora_A, of all lora_B, of all others in the phase,
                            so that a name which came out near by luck is not judged by its luck
    envelope                max(own, family): never falls with the step

Which side a file is a twin of is decided in differ.twins.  Read in step with the comparison, one record of each file in memory
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from differ.align import Row, Rows
from differ.estimate import row_distance
from differ.floors import delta_norm, smallest_norm
from differ.inputs import LORA_A, LORA_B, InputDistance, Inputs, parameters_before
from differ.twins import TwinOf, other_course, sides_of
from tracer.dtypes import EPSILON
from tracer.schema import Phase, State


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
    _family: dict[str, float] = field(default_factory=dict)

    def grow(self, distances: Mapping[str, float]) -> None:
        """Take in the distances of one more step."""
        for name, value in distances.items():
            self._largest[name] = max(self._largest.get(name, 0.0), value)
        families: dict[str, list[float]] = {}
        for name, value in self._largest.items():
            families.setdefault(family(name), []).append(value)
        # "higher": a value that was measured, and the largest where there are few.
        for key, values in families.items():
            high = float(np.quantile(values, self.quantile, method="higher"))
            # A name that joins late and quiet does not make the others quieter.
            self._family[key] = max(self._family.get(key, 0.0), high)

    def level(self) -> Level:
        """The envelope as it is now."""
        return Level(dict(self._largest), dict(self._family))


def family(name: str) -> str:
    """Records whose noise is alike: the factors of LoRA, and everything else."""
    return next((factor for factor in (LORA_A, LORA_B) if name.endswith(factor)), "")


class NoiseFloor:
    """The twins of one comparison.  `floors` answers for a phase and a step; the steps of a phase ascend."""

    def __init__(self, twins: Sequence[Rows], a: Rows, b: Rows, quantile: float) -> None:
        self._twins = [_Twin(rows, sides_of(rows, a, b), quantile) for rows in twins]

    def floors(self, phase: Phase, step: int) -> list[Floor]:
        """Floors of the twins that tell anything about this phase at this step."""
        return [floor for twin in self._twins if (floor := twin.floor(phase, step)) is not None]

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Id and sentence of what is to be said about the noise files: those that measure nothing, or end early."""
        for twin in self._twins:
            name = twin.rows.trace.path.name
            last = twin.rows.trace.last_step
            if twin.unused:
                yield "noise.unused", f"{name} is not used as noise: {twin.unused}"
            elif twin.silent:
                yield "noise.silent", f"{name} is the same to the bit as its run: it measures no noise"
            elif last < max(side.trace.last_step for side in twin.sides):
                yield "noise.short", f"{name} ends after step {last}; its last floor holds from there on"


class _Twin:
    """One noise file and what it is a twin of; `unused` says why it is none, or none from some step on."""

    def __init__(self, rows: Rows, twin_of: TwinOf, quantile: float) -> None:
        self.rows = rows
        self.sides = twin_of.sides
        self.unused = twin_of.reason
        self._quantile = quantile
        self._inputs = {id(side): Inputs(rows, side) for side in self.sides}
        # The last step of each phase that was asked for, and its floor: a run may have more steps than fit in memory.
        self._floors: dict[Phase, tuple[int, Floor | None]] = {}
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
        last, floor = self._floors.get(phase, (0, None))
        for following in range(last + 1, step + 1):
            floor = self._next(phase, following)
            self._floors[phase] = following, floor
        return floor

    def _next(self, phase: Phase, step: int) -> Floor | None:
        self._part_from_others(step)
        if self.unused:
            return None
        envelope = self._envelopes.setdefault(phase, Envelope(self._quantile))
        envelope.grow(self._distances(phase, step))
        level, inputs = envelope.level(), self._inputs_before(step + 1 if phase is Phase.EVAL else step)
        still = not any(level.own.values()) and inputs.model == 0.0 and not any(inputs.own.values())
        return None if still else Floor(level, inputs)

    def _part_from_others(self, step: int) -> None:
        """Let go of a side whose batches or settings are others at this step, and of the file where none is left."""
        reasons = {id(side): other_course(self.rows, side, step) for side in self.sides}
        left = tuple(side for side in self.sides if not reasons[id(side)])
        if self.sides and not left:
            self.unused = "; ".join(reasons.values())
        else:
            self.sides = left

    def _distances(self, phase: Phase, step: int) -> dict[str, float]:
        """Distance of every record of a step; from the nearer side where it is a twin of both."""
        found = [row_distances(self.rows, side, phase, step) for side in self.sides]
        return {name: min(each[name] for each in found) for name in found[0] if all(name in each for each in found)}

    def _inputs_before(self, step: int) -> InputDistance:
        """Envelope of the distance between the parameters that a step starts from."""
        for following in range(max(self._moved) + 1, step + 1):
            before = self._moved[following - 1]
            measured = [found for side in self.sides if (found := self._inputs[id(side)].before(following))]
            if measured:
                row = parameters_before(self.rows, following)
                names = row.positions if row is not None else ()
                self._parameters.grow({name: min(each.own.get(name, 0.0) for each in measured) for name in names})
            level, model = self._parameters.level(), min((each.model for each in measured), default=0.0)
            self._moved[following] = InputDistance(max(before.model, model), {n: level.of(n) for n in level.own})
        return self._moved[step]


def _seals(rows: Rows, phase: Phase) -> list[tuple[int, int, bytes]]:
    return [(row.step, row.micro_batch, row.seal) for row in rows.trace.rows(phase)]


def row_distances(twin: Rows, side: Rows, phase: Phase, step: int) -> dict[str, float]:
    """Distance of every float record of a phase at a step, by name; the largest over its micro-batches."""
    found: dict[str, float] = {}
    for micro_batch in twin.trace.micro_batches(phase, step):
        a, b = twin.get(phase, step, micro_batch), side.get(phase, step, micro_batch)
        if a is None or b is None:
            continue
        floor = smallest_norm(phase, a, b)
        for name in a.positions:
            if _comparable(a, b, name):
                least = max(floor, delta_norm(phase, a, b, name))
                found[name] = max(found.get(name, 0.0), _distance(a, b, name, least))
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
