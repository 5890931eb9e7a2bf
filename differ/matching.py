"""Line up the rows of two `forward` records by position in the batch.

Each side keeps its own sample of positions (`positions`, int64[n, 2]); runs that pad or mask differently keep other ones.
Compared is what both have.  Where the two samples are the same, rows are what they are in the file, digests and all; where
not, a row is seen through `MatchedRow`, which has the common positions only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from differ.align import BLOCK, Row, Tensor
from tracer.schema import POSITIONS

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MatchedRow(Row):
    """A row of `forward` of which only some positions are looked at: `chosen` are their indices, of `recorded`.

    A record that has not one row a position is none of them, and stays as it is.
    """

    chosen: npt.NDArray[np.intp]
    recorded: int
    partial: ClassVar[bool] = True

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the rows that are looked at."""
        shape = super().shape(name)
        return (len(self.chosen), *shape[1:]) if shape[:1] == (self.recorded,) else shape

    def digest(self, name: str) -> bytes:  # noqa: ARG002 - the digest is that of all rows
        """None: a part of a record has no digest."""
        return b""

    def l2(self, name: str) -> float:
        """L2 norm of the rows that are looked at."""
        tensor = self.read(name)
        return math.sqrt(sum(_square(tensor, start) for start in tensor.blocks()))

    def read(self, name: str) -> Tensor:
        """The rows that are looked at; raises Damaged."""
        whole = super().read(name)
        if whole.shape[:1] != (self.recorded,):
            return whole
        return Tensor(whole.stored[self.chosen], whole.dtype)


@dataclass(frozen=True, slots=True)
class Match:
    """What two rows have in common: `positions` int64[n, 2], and their indices in either; `whole` if that is all of both."""

    positions: Positions
    a: npt.NDArray[np.intp]
    b: npt.NDArray[np.intp]
    whole: bool
    # How many positions either has.
    recorded: tuple[int, int]

    def rows(self, a: Row, b: Row) -> tuple[Row, Row]:
        """Both rows as they are compared."""
        if self.whole:
            return a, b
        of_a, of_b = self.recorded
        return MatchedRow(a.view, a.names, a.kept, self.a, of_a), MatchedRow(b.view, b.names, b.kept, self.b, of_b)


def match(a: Row, b: Row) -> Match | None:
    """The common positions of two rows, in a's order; None if a side does not say which positions it has."""
    mine, theirs = positions_of(a), positions_of(b)
    if mine is None or theirs is None:
        return None
    recorded = (len(mine), len(theirs))
    if np.array_equal(mine, theirs):
        every = np.arange(len(mine))
        return Match(mine, every, every, whole=True, recorded=recorded)
    where = {(int(row), int(at)): i for i, (row, at) in enumerate(theirs)}
    pairs = [(i, where[int(row), int(at)]) for i, (row, at) in enumerate(mine) if (int(row), int(at)) in where]
    indices = np.array(pairs, np.intp).reshape(-1, 2)
    return Match(mine[indices[:, 0]], indices[:, 0], indices[:, 1], whole=False, recorded=recorded)


def positions_of(row: Row) -> Positions | None:
    """(row, position) of each row of a row's records, int64[n, 2]; None if they were not recorded."""
    if POSITIONS not in row.positions or not row.stored(POSITIONS):
        return None
    stored = row.read(POSITIONS).stored
    return stored.astype(np.int64) if stored.ndim == 2 and stored.shape[1] == 2 else None


def _square(tensor: Tensor, start: int) -> float:
    values = tensor.block(start, start + BLOCK)
    finite = values[np.isfinite(values)]
    return float(np.dot(finite, finite))
