"""`layout.permutation`: the rows or the columns of a tensor are in another order.

Formula: b[i] = a[p(i)] along one axis, p a permutation.  Rows with the same bits are matched first; rows of eight numbers
and more also by the smallest distance, if that gives every row one partner.  (Shorter ones, and single numbers, would
match in any two draws.)  Known forms of p are named: reversed, rotated by k, halves interleaved.  Share: of the squared
difference, with b put back in order.

Source: heads in another order, rotary dimensions as halves or interleaved pairs, gate and up split the other way.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Float64, Sums, squared
from differ.causes.records import Answer, Place, ask
from differ.result import Cause

ID: Final = "layout.permutation"

Order = npt.NDArray[np.int64]
# Axis, form, by how much it is rotated, the permutation if it has no name and is short.
Key = tuple[int, str, int, tuple[int, ...] | None]

# Rows at least this long may be matched by distance.
LONG: Final = 8
# More rows than this are matched by their bits only: distances take the square of their number.
MOST_ROWS: Final = 2048
# A permutation of up to this many rows is given in full.
LISTED: Final = 64
# Norms that are further apart than this (relative, squared) are no permutation to 0.99.
NORMS: Final = 0.05


def find(context: Context) -> list[Cause]:
    """One cause for every row with permuted records, by axis and form."""
    causes = []
    for group in ask(context, _question):
        axis, form, steps, order = group.key
        lines = ("rows", "columns")[axis] if axis < 2 else f"axis {axis}"
        verb = "has its" if len(group.names) == 1 else "have their"
        how = {"rotated": f"rotated by {steps}", "other": "in another order"}.get(form, form)
        parameters: dict[str, Any] = {"axis": axis, "form": form}
        if form == "rotated":
            parameters["by"] = steps
        if order is not None:
            parameters["permutation"] = list(order)
        causes.append(
            Cause(
                ID, f"{group.subject} {verb} {lines} {how}", step=group.step, phase=group.phase.label,
                names=tuple(group.names), parameters=parameters, explains=group.sums.share,
            )
        )  # fmt: skip
    return causes


def _question(_place: Place, a: Float64, b: Float64) -> Answer[Key] | None:
    norms = squared(a), squared(b)
    if a.ndim == 0 or not abs(norms[0] - norms[1]) <= NORMS * max(norms):
        return None
    for axis in (0, a.ndim - 1) if a.ndim > 1 else (0,):
        x, y = (np.moveaxis(side, axis, 0).reshape(side.shape[axis], -1) for side in (a, b))
        order = _by_bits(x, y)
        if order is None and x.shape[1] >= LONG and len(x) <= MOST_ROWS:
            order = _by_distance(x, y)
        if order is None or (order == np.arange(len(order))).all():
            continue
        back = np.empty_like(y)
        back[order] = y
        sums = Sums()
        sums.add(x, y, back)
        if sums.share >= SHOWN:
            form, steps = _form(order)
            listed = tuple(order.tolist()) if form == "other" and len(order) <= LISTED else None
            return Answer((axis, form, steps, listed), sums)
    return None


def _by_bits(x: Float64, y: Float64) -> Order | None:
    """p of y[i] = x[p(i)] where every row has a partner of the same bits; rows that are in their place stay there."""
    same = (x == y).all(axis=1)
    order = np.where(same, np.arange(len(x)), -1)
    places: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(~same)[::-1]:
        places.setdefault(x[i].tobytes(), []).append(int(i))
    for i in np.flatnonzero(~same):
        here = places.get(y[i].tobytes())
        if not here:
            return None
        order[i] = here.pop()
    return order


def _by_distance(x: Float64, y: Float64) -> Order | None:
    """The same by the smallest distance; None if two rows have the same partner."""
    apart = (x * x).sum(axis=1)[None, :] - 2.0 * (y @ x.T)
    order: Order = apart.argmin(axis=1)
    return order if len(np.unique(order)) == len(order) else None


def _form(order: Order) -> tuple[str, int]:
    """A word for a permutation, and by how much if it is a rotation."""
    n = len(order)
    steps = int(order[0])
    if (order == np.arange(n)[::-1]).all():
        return "reversed", 0
    if (order == (np.arange(n) + steps) % n).all():
        # b[i] = a[i + steps]: b is a rotated towards the beginning.
        return "rotated", steps if steps <= n // 2 else steps - n
    if n % 2 == 0:
        halves = np.arange(n).reshape(2, -1).T.reshape(-1)
        if (order == halves).all():
            return "interleaved", 0
        if (order == np.argsort(halves)).all():
            return "deinterleaved", 0
    return "other", 0
