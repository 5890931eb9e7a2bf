"""Draw strips and curves as SVG paths: numbers of the result to places on the page, and nothing else.

A drawing is stretched to the width that there is, so its texts are HTML beside it and its lines do not scale.  Coordinates:
strips in cells, curves in 1000 x 1000 units with y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from differ.series import Cell, Curve, Mark, Series, Strip
from tracer.schema import Phase

SIZE: Final = 1000.0
# Margins from which a cell within tolerance gets the next darker tone.
LEVELS: Final = (0.01, 0.1, 0.5)
# Strips with more columns than this are drawn without gaps between them.
MOST_GAPPED: Final = 90
TITLES: Final = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "gap": "Divergence: relative gap of loss and gradient norm",
    "margin": "Divergence: worst observed / allowed",
}
_TICKS: Final = 5


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at a share of the axis, from the top or the left."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A curve ready to be put on the page: one path a line, ticks, places of the limit and of values that are no numbers."""

    title: str
    paths: tuple[tuple[str, str], ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    limit: float | None
    odd: str


def tone(cell: Cell) -> str:
    """Class of a cell: its mark, and a level where it was judged and passed."""
    if cell.mark is not Mark.WITHIN or cell.margin is None:
        return cell.mark.value
    return f"within{sum(cell.margin >= level for level in LEVELS)}"


def strip_paths(strip: Strip, columns: int) -> list[tuple[str, str]]:
    """One path of rectangles a tone, for a drawing of `columns` x `len(rows)` units."""
    gap = 0.06 if columns <= MOST_GAPPED else 0.0
    paths: dict[str, list[str]] = {}
    for cell in strip.cells:
        x, width = _short(cell.column + gap), _short(1 - 2 * gap)
        paths.setdefault(tone(cell), []).append(f"M{x} {_short(cell.row + 0.06)}h{width}v.88h-{width}z")
    return [(name, "".join(parts)) for name, parts in sorted(paths.items())]


def strip_dots(strip: Strip) -> str:
    """A mark within each cell that diverged, so that it is told by shape as well as by colour."""
    return "".join(
        f"M{_short(cell.column + 0.5)} {_short(cell.row + 0.5)}h0" for cell in strip.cells if cell.mark is Mark.DIVERGED
    )


def strip_ticks(series: Series) -> list[Tick]:
    """Steps under a strip, each in the middle of its column."""
    total = len(series.columns)
    every = max(1, math.ceil(total / 8))
    return [Tick(100 * (i + 0.5) / total, str(first)) for i, (first, _) in enumerate(series.columns) if i % every == 0]


def draw(curve: Curve, steps: Sequence[int]) -> Drawing:
    """A curve on its own axes."""
    scale = _Scale.of(curve)
    x = [SIZE / 2 if len(steps) == 1 else SIZE * (step - steps[0]) / (steps[-1] - steps[0]) for step in steps]
    odd = sorted({at for line in curve.lines for at, value in zip(x, line.values, strict=True) if _is_odd(value)})
    return Drawing(
        title=TITLES.get(curve.name, curve.name),
        paths=tuple((line.name, _path(x, line.values, scale)) for line in curve.lines),
        x=tuple(_step_ticks(steps)),
        y=tuple(Tick(scale.place(value) / 10, label) for value, label in scale.ticks()),
        limit=None if curve.limit is None else scale.place(curve.limit),
        odd="".join(f"M{_short(at)} 0v60" for at in odd),
    )


def _path(x: Sequence[float], values: Sequence[float | None], scale: _Scale) -> str:
    """Lines through the numbers; a number without neighbours becomes a dot, anything else a gap."""
    parts, down = [], False
    for at, value in zip(x, values, strict=True):
        if value is None or _is_odd(value):
            down = False
            continue
        parts.append(f"{'L' if down else 'M'}{_short(at)} {_short(scale.place(value))}{'' if down else 'h0'}")
        down = True
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places: linear, or logarithmic with zero at the bottom."""

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(curve: Curve) -> _Scale:
        values = [value for line in curve.lines for value in line.values if value is not None and math.isfinite(value)]
        if curve.limit is not None:
            values.append(curve.limit)
        if curve.logarithmic:
            logs = [math.log10(value) for value in values if value > 0] or [0.0]
            # A decade below the smallest is kept for zero.
            return _Scale(math.floor(min(logs)) - 1, max(math.ceil(max(logs)), math.floor(min(logs)) + 1), True)
        low, high = min(values, default=0.0), max(values, default=1.0)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return _Scale(low - pad, high + pad, False)

    def place(self, value: float) -> float:
        """Distance from the top."""
        if self.logarithmic:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low)
        return SIZE * (1 - min(1.0, max(0.0, share)))

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Values and their labels."""
        if not self.logarithmic:
            yield from ((value, f"{value:.6g}") for value in _nice(self.low, self.high))
            return
        yield 0.0, "0"
        every = max(1, math.ceil((self.high - self.low) / _TICKS))
        for power in range(int(self.low) + every, int(self.high) + 1, every):
            yield 10.0**power, f"{10.0**power:g}"


def _nice(low: float, high: float) -> list[float]:
    """Round values within a range, about _TICKS of them."""
    raw = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _step_ticks(steps: Sequence[int]) -> Iterator[Tick]:
    if len(steps) == 1:
        yield Tick(50.0, str(steps[0]))
        return
    span = steps[-1] - steps[0]
    every = max(1, int(_nice(0, span)[1])) if span > _TICKS else 1
    wanted = {steps[0], *(step for step in range(steps[0], steps[-1] + 1) if step % every == 0)}
    last = -math.inf
    for step in sorted(wanted):
        at = 100 * (step - steps[0]) / span
        if at - last >= 7:
            yield Tick(at, str(step))
            last = at


def island(series: Series | None) -> dict[str, Any]:
    """The numbers that the script reads out, next to the drawings."""
    if series is None:
        return {}
    return {
        "steps": series.steps,
        "columns": series.columns,
        "curves": {
            curve.name: [[line.name, [_plain(value) for value in line.values]] for line in curve.lines]
            for curve in series.curves
        },
        "strips": {
            strip.name: {"rows": strip.rows, "cells": [_cell(cell) for cell in strip.cells]}
            for strip in (series.phases, *series.layers)
        },
    }


def _cell(cell: Cell) -> list[Any]:
    counts = [cell.same_bits, cell.within, cell.propagated, cell.diverged]
    return [cell.column, cell.row, *counts, _plain(cell.margin), _plain(cell.gap)]


def _plain(value: float | None) -> float | str | None:
    if value is None:
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _is_odd(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


def order(phase: str) -> int:
    """Place of a phase in causal order."""
    return int(Phase.parse(phase))


def marks(strips: Iterable[Strip]) -> set[str]:
    """Which tones occur, for the legend."""
    return {tone(cell) for strip in strips for cell in strip.cells}
