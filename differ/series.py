"""What a report draws: curves of both runs, and strips that say step by step what became of the records.

Types only.  `differ.collect` fills them while the engine walks through the steps; they are made only when a report asks
(`DiffOptions.series`) and stay out of the default JSON.  They never bear on the verdict.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Mark(enum.StrEnum):
    """What became of the records of a cell, the worst of them first."""

    DIVERGED = "diverged"
    PROPAGATED = "propagated"
    WITHIN = "within"
    SAME = "same"
    UNRECORDED = "unrecorded"


@dataclass(frozen=True, slots=True)
class Cell:
    """The records of one row of a strip in one of its columns.

    `column` and `row` are indices into `Series.columns` and `Strip.rows`.  `margin` is the worst observed / allowed of
    the judged records, None if none was judged.  `gap` is the relative difference of the two sides' L2 norms,
    |a - b| / max(a, b), None where a side has none: a lower bound of the relative error, never a proof of agreement.
    """

    column: int
    row: int
    mark: Mark
    same_bits: int = 0
    within: int = 0
    propagated: int = 0
    diverged: int = 0
    margin: float | None = None
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class Strip:
    """A grid of cells; `rows` are their names, top to bottom, and `left_out` counts rows beyond the most that are kept."""

    name: str
    rows: tuple[str, ...]
    cells: tuple[Cell, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a curve; a value is None where it was not recorded, and nan or inf where it is."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Lines over `Series.steps`; `logarithmic` if they span decades; `limit` is a level that must not be passed."""

    name: str
    lines: tuple[Line, ...]
    logarithmic: bool = False
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseTotal:
    """What became of the records of one phase, over all steps."""

    phase: str
    same_bits: int
    within: int
    propagated: int
    diverged: int
    unrecorded: int
    margin: float | None

    @property
    def compared(self) -> int:
        """Records that were judged, or had the same bits."""
        return self.same_bits + self.within + self.diverged


@dataclass(frozen=True, slots=True)
class RecordTotal:
    """One judged record of a phase over all steps: how often it was judged, and where it was nearest to its tolerance."""

    phase: str
    name: str
    judged: int
    margin: float
    step: int
    observed: float
    tolerance: float
    diverged_at: int | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Everything that a report draws.

    `steps` are the steps of the curves.  `columns` are the ranges of steps (first, last) of the strips: one step each
    unless there are too many.  `layers` holds one strip for each phase that has layers.
    """

    steps: tuple[int, ...]
    columns: tuple[tuple[int, int], ...]
    curves: tuple[Curve, ...]
    phases: Strip
    layers: tuple[Strip, ...]
    totals: tuple[PhaseTotal, ...]
    records: tuple[RecordTotal, ...]
