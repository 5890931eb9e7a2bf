"""The micro-batches that ranks were given at the same time, as the one batch that a single process would be given.

Rows follow each other rank after rank (a loader that deals whole batches), or by turns (one that deals single rows).  Ranks pad
to different lengths; the joined batch has the longest, padded as the ranks pad.  A loss is the mean of the ranks' losses: that is
what the run differentiates.  Invariant: a record that cannot be joined is *unrecorded*, never a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.built import Absent, Held, Made, Source
from tracer.dtypes import DTYPES, from_float64, to_float64
from tracer.reader import RowView
from tracer.schema import POSITIONS, IndexEntry, Phase, State

IGNORED: Final = -100
IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
# What stands where a shorter batch is padded; ids are padded as the ranks pad them.
PADDING: Final = {LABELS: IGNORED, "shift_labels": IGNORED}
# Scalars of a batch that add up, and those of which the run has the mean.
SUMMED: Final = frozenset({"tokens"})
AVERAGED: Final = frozenset({"loss"})

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Deal:
    """How rows were dealt to ranks: `heights`, the rows of each rank's batch; `by_turns`: row by row."""

    heights: tuple[int, ...]
    by_turns: bool

    def rows(self) -> list[tuple[int, int]]:
        """(rank, row) of each row of the joined batch."""
        all_rows = [(rank, row) for rank, height in enumerate(self.heights) for row in range(height)]
        return sorted(all_rows, key=lambda one: (one[1], one[0])) if self.by_turns else all_rows


def join_rows(rows: Sequence[RowView], batches: Sequence[RowView | None], *, by_turns: bool) -> list[Source]:
    """Sources of the joined row: `rows` of one phase, one a rank; `batches`: the rows of phase `batch` that they belong to."""
    deal = Deal(tuple(_height(batch or row) for row, batch in zip(rows, batches, strict=True)), by_turns)
    names = [name for name in rows[0].layout.positions if all(name in row.layout.positions for row in rows)]
    inside = rows[0].phase is Phase.FORWARD
    if inside and (POSITIONS not in names or any(batch is None for batch in batches)):
        # How many rows a batch has is known from the batch alone.
        return [Absent(replace(rows[0].layout.entries[rows[0].layout.positions[name]], alias_of="")) for name in names]
    order = _positions_order(rows, deal) if inside else None
    return [_joined([Held(row, row.layout.positions[name]) for row in rows], rows, deal, order) for name in names]


def _height(row: RowView) -> int:
    """Rows of a batch: the first dimension of its first record that has one."""
    return next((entry.shape[0] for entry in row.layout.entries if entry.shape), 1)


def _joined(held: Sequence[Held], rows: Sequence[RowView], deal: Deal, order: npt.NDArray[np.int64] | None) -> Source:
    entry = held[0].entry
    if any(one.state() not in (State.VALUE, State.ZERO) or not one.stored() for one in held):
        return Absent(replace(entry, alias_of=""))
    if not entry.shape:
        return _scalar(entry, held)
    if order is not None:
        return _forward(entry, held, deal, order)
    return _stacked(entry, held, rows, deal)


def _scalar(entry: IndexEntry, held: Sequence[Held]) -> Source:
    values = [to_float64(one.read(), entry.dtype) for one in held]
    if entry.name in SUMMED:
        return _made(entry, (), lambda: from_float64(np.sum(values, axis=0), entry.dtype))
    if entry.name in AVERAGED:
        return _made(entry, (), lambda: from_float64(np.mean(values, axis=0), entry.dtype))
    return held[0] if all(value == values[0] for value in values) else Absent(entry)


def _made(entry: IndexEntry, shape: tuple[int, ...], make: Callable[[], Array]) -> Made:
    return Made(replace(entry, shape=shape, alias_of=""), make)


def _stacked(entry: IndexEntry, held: Sequence[Held], rows: Sequence[RowView], deal: Deal) -> Source:
    """Batches above each other, padded to the longest."""
    shapes = [one.entry.shape for one in held]
    alike = {(len(shape), shape[2:], one.entry.dtype) for shape, one in zip(shapes, held, strict=True)}
    if len(alike) > 1 or tuple(shape[0] for shape in shapes) != deal.heights:
        return Absent(entry)
    longest = max((shape[1] for shape in shapes if len(shape) > 1), default=0)
    whole = (sum(deal.heights), *((longest,) if len(shapes[0]) > 1 else ()), *shapes[0][2:])

    def make() -> Array:
        fill = _pad_id(rows) if entry.name == IDS else PADDING.get(entry.name, 0)
        stacked = np.full(whole, fill, DTYPES[entry.dtype])
        parts = [one.read() for one in held]
        for at, (rank, row) in enumerate(deal.rows()):
            values = parts[rank][row]
            stacked[(at, slice(values.shape[0])) if values.ndim else at] = values
        return stacked

    return _made(entry, whole, make)


def _pad_id(rows: Sequence[RowView]) -> int:
    """The id that a rank's batch holds where its mask says that there is nothing; 0 if none is padded."""
    for row in rows:
        positions = row.layout.positions
        if IDS in positions and MASK in positions:
            masked = row.read(positions[IDS])[row.read(positions[MASK]) == 0]
            if masked.size:
                return int(masked[-1])
    return 0


# Module outputs, whose rows are (row, position) of the batch.


def _positions_order(rows: Sequence[RowView], deal: Deal) -> npt.NDArray[np.int64]:
    """Indices that put the ranks' positions, one rank after the other, into the ascending order of the joined batch."""
    joined = _joined_positions([row.read(row.layout.positions[POSITIONS]) for row in rows], deal)
    return np.lexsort((joined[:, 1], joined[:, 0])).astype(np.int64)


def _joined_positions(parts: Sequence[Array], deal: Deal) -> Array:
    number = {place: at for at, place in enumerate(deal.rows())}
    moved = [
        np.stack([[number[rank, int(row)] for row in part[:, 0]], part[:, 1]], axis=1) if len(part) else part
        for rank, part in enumerate(parts)
    ]
    return np.concatenate(moved).astype(np.int64)


def _forward(entry: IndexEntry, held: Sequence[Held], deal: Deal, order: npt.NDArray[np.int64]) -> Source:
    if len({one.entry.shape[1:] for one in held}) > 1:
        return Absent(entry)

    def make() -> Array:
        parts = [one.read() for one in held]
        whole = _joined_positions(parts, deal) if entry.name == POSITIONS else np.concatenate(parts)
        return np.asarray(whole[order])

    return _made(entry, (len(order), *entry.shape[1:]), make)
