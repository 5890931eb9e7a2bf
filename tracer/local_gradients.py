"""Whether gradients that differ between ranks are each rank's own part of one gradient, which the program averages itself.

A loop without DDP (and every MLX program) has local gradients after its backward and exchanges them afterwards.  What the
optimizer got then tells: it is the same on all ranks, and a combination of what they had,

    given = sum over ranks of c_r * gradient_r          to rounding; fitted on the largest tensors

with all c_r alike unless each rank clipped before the exchange.  If it is not, the ranks' gradients have drifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tracer.dtypes import EPSILON, to_float64
from tracer.reader import RowView, Trace
from tracer.schema import IndexEntry, Phase, State

# Tensors that are looked at, and elements of each.
TENSORS: Final = 3
ELEMENTS: Final = 2**20
# A combination is exact but for this many units of rounding.
ROUNDINGS: Final = 16.0
ALIKE: Final = 1e-3


def share_of(members: Sequence[Trace], step: int, names: Sequence[str]) -> float | None:
    """What each rank's gradient counts in the run's: 1 / ranks for a mean, 1 for a sum; None if they are not parts of one."""
    grads = [member.row(Phase.GRAD, step) for member in members]
    given = [member.row(Phase.CLIPPED_GRAD, step) for member in members]
    if any(row is None for row in given):
        updated = [member.row(Phase.PARAM, step) for member in members]
        agree = all(row is not None and updated[0] is not None and row.seal == updated[0].seal for row in updated)
        return 1.0 / len(members) if agree else None
    largest = _largest(grads, given, names)
    if not largest:
        # Without tensors the digests tell as much: what differed before the exchange is the same after it.
        return 1.0 / len(members) if all(_agree([row for row in given if row], name) for name in names) else None
    factors = []
    for name in largest:
        found = _factors([row for row in grads if row], [row for row in given if row], name)
        if found is None:
            return None
        factors.append(found)
    return 1.0 if all(np.allclose(found, 1.0, rtol=ALIKE) for found in factors) else 1.0 / len(members)


def _largest(grads: Sequence[RowView | None], given: Sequence[RowView | None], names: Sequence[str]) -> list[str]:
    """The names with the largest gradients, of those that every rank has stored."""
    sizes = {}
    for name in names:
        rows = [row for row in (*grads, *given) if row is not None]
        if all(_readable(row, name) for row in rows):
            sizes[name] = max(float(row.stats[row.layout.positions[name], 0]) for row in rows)
    return sorted(sizes, key=lambda name: -sizes[name])[:TENSORS]


def _readable(row: RowView, name: str) -> bool:
    i = row.layout.positions.get(name)
    return i is not None and row.state(i) in (State.VALUE, State.ZERO) and row.stored(i)


def _agree(given: Sequence[RowView], name: str) -> bool:
    """Whether the ranks' optimizers got the same; a record that refers to the gradient is that."""
    if any(name not in row.layout.positions for row in given):
        return False
    return len({row.digests[row.layout.positions[name]].tobytes() for row in given}) == 1


def _factors(grads: Sequence[RowView], given: Sequence[RowView], name: str) -> np.ndarray | None:
    """c_r of one tensor; None if what the ranks' optimizers got differs, or is no combination of the gradients."""
    if not _agree(given, name):
        return None
    parts = [_values(row, name) for row in grads]
    target = _values(given[0], name)
    matrix = np.stack(parts, axis=1)
    if len(target) <= len(grads) or not np.isfinite(matrix).all() or not np.isfinite(target).all():
        return None
    factors = np.linalg.lstsq(matrix, target, rcond=None)[0]
    # The sum may be small beside its terms, whose rounding it has.
    scale = float(np.linalg.norm(target)) + float(
        sum(abs(c) * np.linalg.norm(g) for c, g in zip(factors, parts, strict=True))
    )
    left = float(np.linalg.norm(matrix @ factors - target))
    coarsest = max(EPSILON.get(_entry(row, name).dtype, 0.0) for row in (*grads, given[0]))
    return factors if left <= ROUNDINGS * coarsest * scale else None


def _entry(row: RowView, name: str) -> IndexEntry:
    return row.layout.entries[row.layout.positions[name]]


def _values(row: RowView, name: str) -> np.ndarray:
    """The first elements of a tensor; what an optimizer gets may have another dtype than the gradient (MLX clips in float32)."""
    return to_float64(row.read(row.layout.positions[name]).reshape(-1)[:ELEMENTS], _entry(row, name).dtype)
