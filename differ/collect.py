"""Collect what a report draws, while the engine walks through two traces.

Reads tables only, never a tensor: statistics for losses and norms, digests for equal bits; margins come from the
engine's own measurements, so a strip shows what the verdict was made of.

    gradient norm    sqrt(sum of l2^2) of the records of `grad`
    gap              |a - b| / max(|a|, |b|), 0 where both are 0
    layer            the name up to its first number behind `layers`, `h` or `blocks`; else the module's name
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.align import Row
from differ.options import DiffOptions, Measurement
from differ.result import Counts, Finding, Kind
from differ.series import Cell, Curve, Line, Mark, PhaseTotal, RecordTotal, Series, Strip
from differ.tally import Tally, ratio
from tracer.names import split_state_name
from tracer.schema import REPORTED_PREFIX, STATS, Phase, State

# More columns than this are narrower than a pixel on a small screen; steps are then put together.
MOST_COLUMNS: Final = 240
MOST_LAYERS: Final = 128
# Phases whose records belong to layers.
LAYERED: Final = (Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)

_LAYER: Final = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.\d+(?=\.)")
_L2, _MEAN, _NAN, _INF = (STATS.index(stat) for stat in ("l2", "mean", "nan", "inf"))
_UNKNOWN: Final = math.nan


@dataclass(slots=True)
class _Sum:
    """A cell that is being filled."""

    same_bits: int = 0
    within: int = 0
    propagated: int = 0
    diverged: int = 0
    unrecorded: int = 0
    margin: float | None = None
    gap: float | None = None

    def add(self, other: _Sum) -> None:
        for count in ("same_bits", "within", "propagated", "diverged", "unrecorded"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        self.margin, self.gap = _larger(self.margin, other.margin), _larger(self.gap, other.gap)

    def mark(self) -> Mark:
        for mark in (Mark.DIVERGED, Mark.PROPAGATED, Mark.WITHIN):
            if getattr(self, mark.value):
                return mark
        return Mark.SAME if self.same_bits else Mark.UNRECORDED


@dataclass(slots=True)
class _Judged:
    """The measurements of one record of a phase."""

    count: int = 0
    worst: Measurement | None = None
    margin: float = -1.0


@dataclass(slots=True)
class Collector:
    """Collects during one comparison; `measured` is the engine's probe, `row` is called after each row."""

    options: DiffOptions
    _steps: set[int] = field(default_factory=set)
    _before: Counts = field(default_factory=Counts)
    _phases: dict[tuple[int, Phase], _Sum] = field(default_factory=dict)
    _layers: dict[tuple[int, Phase, str], _Sum] = field(default_factory=dict)
    _judged: dict[tuple[Phase, str], _Judged] = field(default_factory=dict)
    _judged_here: dict[str, float] = field(default_factory=dict)
    _losses: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    _norms: dict[tuple[int, str], float] = field(default_factory=dict)
    _groups: dict[bytes, _Group] = field(default_factory=dict)
    _pairs: dict[tuple[bytes, bytes], _Positions] = field(default_factory=dict)

    def measured(self, measurement: Measurement) -> None:
        """A judged record; passed on to the caller's own probe."""
        if self.options.probe is not None:
            self.options.probe(measurement)
        if not self.options.wants_phase(measurement.phase):
            return
        margin = ratio(measurement.observed, measurement.tolerance)
        cell = self._phases.setdefault((measurement.step, measurement.phase), _Sum())
        cell.margin = _larger(cell.margin, margin)
        judged = self._judged.setdefault((measurement.phase, measurement.name), _Judged())
        judged.count += 1
        if margin > judged.margin:
            judged.worst, judged.margin = measurement, margin
        self._judged_here[measurement.name] = max(margin, self._judged_here.get(measurement.name, 0.0))

    def row(self, phase: Phase, step: int, a: Row | None, b: Row | None, tally: Tally) -> None:
        """What became of a row that was just compared."""
        self._steps.add(step)
        counts, before = tally.counts(), self._before
        self._before = counts
        if self.options.wants_phase(phase):
            cell = self._phases.setdefault((step, phase), _Sum())
            for name in ("same_bits", "within", "propagated", "unrecorded"):
                setattr(cell, name, getattr(cell, name) + getattr(counts, name) - getattr(before, name))
            if phase in LAYERED and a is not None and b is not None:
                self._layer_cells(phase, step, a, b)
        for side, row in (("a", a), ("b", b)):
            if row is not None:
                self._curve_values(phase, step, side, row)
        self._judged_here.clear()

    def build(self, findings: Iterable[Finding]) -> Series:
        """The series of the whole comparison."""
        found = tuple(findings)
        steps = tuple(sorted(self._steps | {finding.step for finding in found}))
        for finding in found:
            self._find(finding)
        columns = _columns(steps)
        column = {step: i for i, (first, last) in enumerate(columns) for step in steps if first <= step <= last}
        phases = sorted({phase for _, phase in self._phases})
        cells = {(column_of, phase.label): cell for (column_of, phase), cell in self._columns(column).items()}
        return Series(
            steps=tuple(step for step in steps if step > 0),
            columns=columns,
            curves=tuple(self._curves(tuple(step for step in steps if step > 0))),
            phases=_strip("phases", [phase.label for phase in phases], cells),
            layers=tuple(self._layer_strips(column)),
            totals=tuple(self._total(phase) for phase in phases),
            records=self._records(found),
        )

    def _find(self, finding: Finding) -> None:
        """Count a finding where it belongs; rows that one side lacks altogether have no cell yet."""
        phase = Phase.parse(finding.phase)
        self._phases.setdefault((finding.step, phase), _Sum()).diverged += 1
        if finding.name is not None and phase in LAYERED:
            cell = self._layers.setdefault((finding.step, phase, layer_of(_parameter(phase, finding.name))), _Sum())
            cell.diverged += 1
            if finding.kind not in (Kind.MISSING_A, Kind.MISSING_B):
                cell.within = max(0, cell.within - 1)  # it was counted among the judged

    # One row.

    def _layer_cells(self, phase: Phase, step: int, a: Row, b: Row) -> None:
        groups = self._group(phase, a), self._group(phase, b)
        gaps = _gaps(groups[0].norms(a), groups[1].norms(b))
        margins: dict[str, list[float]] = {}
        for name, margin in self._judged_here.items():
            margins.setdefault(layer_of(_parameter(phase, name)), []).append(margin)
        at = self._positions(a, b)
        differs = _differ(a, b, at)
        layers = groups[0].layer[at.a]
        for i, label in enumerate(groups[0].labels):
            here = layers == i
            unequal, judged = int(differs[here].sum()), margins.get(label, [])
            cell = _Sum(int(here.sum()) - unequal, len(judged), max(0, unequal - len(judged)), gap=gaps.get(label))
            cell.margin = max(judged, default=None)
            self._layers.setdefault((step, phase, label), _Sum()).add(cell)

    def _group(self, phase: Phase, row: Row) -> _Group:
        key = row.view.layout.digest
        if key not in self._groups:
            self._groups[key] = _group(phase, row, self.options.wants_name)
        return self._groups[key]

    def _positions(self, a: Row, b: Row) -> _Positions:
        key = (a.view.layout.digest, b.view.layout.digest)
        if key not in self._pairs:
            common = [name for name in a.positions if name in b.positions]
            self._pairs[key] = _Positions(
                np.array([a.positions[name] for name in common], np.intp),
                np.array([b.positions[name] for name in common], np.intp),
            )
        return self._pairs[key]

    def _curve_values(self, phase: Phase, step: int, side: str, row: Row) -> None:
        if phase is Phase.LOSS and (at := row.positions.get("loss")) is not None:
            value = _mean(row.view.stats[at]) if row.state("loss") in (State.VALUE, State.ZERO) else _UNKNOWN
            self._losses.setdefault((step, side), []).append(value)
        elif phase is Phase.GRAD:
            squares = [norm * norm for norm in self._group(phase, row).norms(row).values()]
            self._norms[step, side] = math.sqrt(sum(squares))

    # The whole.

    def _curves(self, steps: tuple[int, ...]) -> Iterable[Curve]:
        losses = {key: sum(values) / len(values) for key, values in self._losses.items()}
        gaps = []
        for name, label, table in (("loss", "loss", losses), ("grad_norm", "gradient norm", self._norms)):
            sides = [_line(side, steps, {s: v for (s, at), v in table.items() if at == side}) for side in "ab"]
            if table:
                yield Curve(name, tuple(sides))
            gap = _line(label, steps, {step: _gap(table.get((step, "a")), table.get((step, "b"))) for step in steps})
            if any(value is not None for value in gap.values):
                gaps.append(gap)
        if gaps:
            yield Curve("gap", tuple(gaps), logarithmic=True)
        worst: dict[int, float | None] = {}
        for (step, _), cell in self._phases.items():
            worst[step] = _larger(worst.get(step), cell.margin)
        if any(value is not None for value in worst.values()):
            yield Curve("margin", (_line("worst of tolerance", steps, worst),), logarithmic=True, limit=1.0)

    def _columns(self, column: Mapping[int, int]) -> dict[tuple[int, Phase], _Sum]:
        cells: dict[tuple[int, Phase], _Sum] = {}
        for (step, phase), cell in self._phases.items():
            cells.setdefault((column[step], phase), _Sum()).add(cell)
        return cells

    def _layer_strips(self, column: Mapping[int, int]) -> Iterable[Strip]:
        for phase in LAYERED:
            cells: dict[tuple[int, str], _Sum] = {}
            for (step, at, label), cell in self._layers.items():
                if at is phase:
                    cells.setdefault((column[step], label), _Sum()).add(cell)
            if cells:
                labels = sorted({label for _, label in cells}, key=_natural)
                strip = _strip(phase.label, labels[:MOST_LAYERS], cells)
                yield replace(strip, rows=_short(strip.rows), left_out=max(0, len(labels) - MOST_LAYERS))

    def _total(self, phase: Phase) -> PhaseTotal:
        total = _Sum()
        for (_, at), cell in self._phases.items():
            if at is phase:
                total.add(cell)
        return PhaseTotal(
            phase.label, total.same_bits, total.within, total.propagated, total.diverged, total.unrecorded, total.margin
        )

    def _records(self, findings: Iterable[Finding]) -> tuple[RecordTotal, ...]:
        """Judged records, worst first."""
        found: dict[tuple[str, str | None], int] = {}
        for finding in findings:
            found.setdefault((finding.phase, finding.name), finding.step)
        totals = [
            RecordTotal(
                phase.label, name, judged.count, judged.margin, judged.worst.step, judged.worst.observed,
                judged.worst.tolerance, found.get((phase.label, name)),
            )
            for (phase, name), judged in self._judged.items() if judged.worst is not None
        ]  # fmt: skip
        return tuple(sorted(totals, key=lambda total: (-total.margin, Phase.parse(total.phase), total.name)))


@dataclass(frozen=True, slots=True)
class _Positions:
    """Positions of the records that two layouts have in common, in the same order."""

    a: npt.NDArray[np.intp]
    b: npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers of a layout: `layer` int[n] is each record's index into `labels`, -1 for a record that counts in none."""

    labels: tuple[str, ...]
    layer: npt.NDArray[np.intp]

    def norms(self, row: Row) -> dict[str, float]:
        """L2 norm of each layer's records; nan where a record has no value, or holds nan or inf."""
        inside = self.layer >= 0
        stats = row.view.stats
        squares = np.where((stats[:, _NAN] > 0) | (stats[:, _INF] > 0), _UNKNOWN, stats[:, _L2] ** 2)
        squares[row.view.states == State.UNRECORDED] = _UNKNOWN
        sums = np.bincount(self.layer[inside], squares[inside], minlength=len(self.labels))
        return {label: math.sqrt(total) for label, total in zip(self.labels, sums.tolist(), strict=True)}


def _group(phase: Phase, row: Row, wanted: Callable[[str], bool]) -> _Group:
    numbers: dict[str, int] = {}
    layer = np.full(row.view.layout.records, -1, np.intp)
    for name, position in row.positions.items():
        parameter = _parameter(phase, name)
        if parameter and not name.startswith(REPORTED_PREFIX) and wanted(name):
            layer[position] = numbers.setdefault(layer_of(parameter), len(numbers))
    return _Group(tuple(numbers), layer)


def _parameter(phase: Phase, name: str) -> str:
    return split_state_name(name)[0] if phase is Phase.OPT_STATE else name


def layer_of(parameter: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; the module of a parameter that is in no layer."""
    match = _LAYER.match(parameter)
    return match[0] if match else parameter.rpartition(".")[0] or parameter


def _natural(label: str) -> tuple[Any, ...]:
    """Sort key: layers by number, then whatever is in no layer."""
    words = [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in label.split(".")]
    return (_LAYER.match(f"{label}.") is None, words)


def _short(labels: tuple[str, ...]) -> tuple[str, ...]:
    """`layer 3` for `model.layers.3` if all layers are of one stack."""
    layers = {label for label in labels if _LAYER.match(f"{label}.")}
    if len({label.rpartition(".")[0] for label in layers}) != 1:
        return labels
    return tuple(f"layer {label.rpartition('.')[2]}" if label in layers else label for label in labels)


def _differ(a: Row, b: Row, at: _Positions) -> npt.NDArray[np.bool_]:
    """Which records differ in their digests; one that a user's rule transposes cannot be told, and counts as differing."""
    if a.view.seal == b.view.seal:
        return np.zeros(len(at.a), bool)
    differs: npt.NDArray[np.bool_] = a.view.digests[at.a] != b.view.digests[at.b]
    for positions, row in ((at.a, a), (at.b, b)):
        differs |= np.isin(positions, list(row.names.transposed))
    return differs


def _strip(name: str, labels: list[str], cells: Mapping[tuple[int, str], _Sum]) -> Strip:
    rows = {label: i for i, label in enumerate(labels)}
    made = [
        Cell(
            column, rows[label], cell.mark(), cell.same_bits, cell.within, cell.propagated, cell.diverged, cell.margin, cell.gap
        )
        for (column, label), cell in cells.items() if label in rows
    ]  # fmt: skip
    return Strip(name, tuple(labels), tuple(sorted(made, key=lambda cell: (cell.row, cell.column))))


def _columns(steps: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Ranges of steps: step 0 by itself, the others evenly so that there are at most MOST_COLUMNS."""
    width = max(1, math.ceil(len(steps) / MOST_COLUMNS))
    start = 1 if steps and steps[0] == 0 else 0
    groups = [steps[i : i + width] for i in range(start, len(steps), width)]
    return tuple((group[0], group[-1]) for group in (steps[:start], *groups) if group)


def _line(name: str, steps: tuple[int, ...], values: Mapping[int, float | None]) -> Line:
    return Line(name, tuple(values.get(step) for step in steps))


def _gap(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    larger = max(abs(a), abs(b))
    return abs(a - b) / larger if larger else 0.0


def _gaps(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float | None]:
    return {label: _gap(norm, b.get(label)) for label, norm in a.items()}


def _mean(stats: npt.NDArray[np.float64]) -> float:
    """Mean of a record; nan or inf where it holds one."""
    if stats[_NAN] > 0:
        return math.nan
    return math.inf if stats[_INF] > 0 else float(stats[_MEAN])


def _larger(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return b if a is None else a
    # nan is the larger: it must not hide behind a number.
    return a if math.isnan(a) or a >= b else b
