"""Distance of one record's two sides: measured where both files hold the tensor, else estimated from sketches.

A side that holds the tensor is sketched on the fly, in the same arithmetic, so that equal tensors have equal sketches.  An
estimate has no largest element and no place: only norms, and how many elements are not finite.
"""

from __future__ import annotations

import math

from differ.align import Row
from differ.compare import Distance, distance
from tracer.schema import STATS, State
from tracer.sketch import Sketch, sketch, sketch_distance

_L2, _NAN, _INF = (STATS.index(stat) for stat in ("l2", "nan", "inf"))


def row_distance(a: Row, b: Row, name: str) -> Distance | None:
    """Distance of a record's two sides; None if a side holds neither tensor nor sketch, or not in this layout."""
    if a.stored(name) and b.stored(name):
        return distance(a.read(name), b.read(name))
    sketches = _sketch(a, name), _sketch(b, name)
    if sketches[0] is None or sketches[1] is None:
        return None
    odd = any(_stat(a, name, column) != _stat(b, name, column) for column in (_NAN, _INF))
    diff = sketch_distance(sketches[0], sketches[1])
    return Distance(diff, _stat(a, name, _L2), _stat(b, name, _L2), math.nan, 0, 0 if odd else -1)


def has_sketch(row: Row, name: str) -> bool:
    """Whether a record's tensor was replaced by a sketch."""
    return row.view.sketched(row.positions[name])


def is_trainable(row: Row, name: str) -> bool:
    """Whether a record of `init` is a trained parameter, of which the file holds the tensor or a sketch."""
    return row.stored(name) or has_sketch(row, name)


def _sketch(row: Row, name: str) -> Sketch | None:
    """Sketch of a side; a sketch that a user's rule transposes is none, because its elements are in another order."""
    position = row.positions[name]
    if row.state(name) not in (State.VALUE, State.ZERO):
        return None
    if row.stored(name):
        tensor = row.read(name)
        return sketch(tensor.stored, tensor.dtype)
    if has_sketch(row, name) and position not in row.names.transposed:
        return row.view.read_sketch(position)
    return None


def _stat(row: Row, name: str, column: int) -> float:
    return float(row.view.stats[row.positions[name], column])
