"""`batch.positions`: the same ids at other positions: begun again for each document or not, off by a constant, or with padding
counted or not.

    restart     p(t) = p0 + t - s(t), s(t) the begin of the document that t is in     against other begins, or none
    padding     p(t) = p0 + t     against     p0 + the number of attended positions before t
    offset      p_b(t) = p_a(t) + c
    unattended  the positions differ only where attention_mask is 0, and so reach nothing

A form must give every position that both sides attend to (all, without a mask), in every row of the step, to the last one; the
share is then 1.  What positions padding has never matters.

Source: packed documents without a position reset (trl #3526, LlamaFactory #4224); left padding that is counted
(transformers #33095, alpaca-lora #315); tables of positions that begin at 1 or 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.causes.batches import INPUT_IDS, MASK, POSITIONS, Ints, batch_steps
from differ.causes.context import Context
from differ.causes.words import count
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "batch.positions"

# Places that are listed as [micro-batch, row, column].
MOST_LISTED: Final = 8
# Mean length from which what a row falls into are documents: positions that are all 0 begin again at every token.
SHORTEST: Final = 2

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Row:
    """Positions int64[L] of both sides in one row of one micro-batch, and which of them both attend to; one at least."""

    micro_batch: int
    number: int
    a: Ints
    b: Ints
    on: Bools

    def attended(self, side: str) -> Ints:
        """The positions of a side that are attended to."""
        return (self.a if side == "a" else self.b)[self.on]

    @property
    def columns(self) -> Ints:
        """Where they are in the row."""
        return np.flatnonzero(self.on)


@dataclass(frozen=True, slots=True)
class _Form:
    """A form that holds: what was fitted, and the sentence."""

    parameters: dict[str, Any]
    summary: str


def find(context: Context) -> list[Cause]:
    """At most one cause for every step at which positions begin to differ."""
    causes = []
    for step, found in batch_steps(context):
        names = {f.name for f in found}
        form = _form(context, step) if POSITIONS in names and INPUT_IDS not in names else None
        if form is not None:
            causes.append(
                Cause(
                    ID, form.summary, step=step, phase=Phase.BATCH.label, names=(POSITIONS,), parameters=form.parameters,
                    explains=1.0,
                )
            )  # fmt: skip
    return causes


def _form(context: Context, step: int) -> _Form | None:
    rows: list[_Row] = []
    for micro_batch in context.micro_batches(Phase.BATCH, step):
        both = context.pair(Phase.BATCH, step, POSITIONS, micro_batch)
        if both is None or both[0].ndim == 0:
            return None
        a, b = (values.astype(np.int64).reshape(-1, values.shape[-1]) for values in both)
        on = _attended(context, step, micro_batch, a.shape)
        rows += [_Row(micro_batch, i, a[i], b[i], on[i]) for i in range(len(a)) if on[i].any()]
    if all((row.attended("a") == row.attended("b")).all() for row in rows):
        return _Form({"form": "unattended"}, "positions differ only where nothing is attended to (padding)")
    return next((form for fit in FORMS if (form := fit(rows)) is not None), None)


def _attended(context: Context, step: int, micro_batch: int, shape: tuple[int, ...]) -> Bools:
    """Where both sides attend, [rows, L]; everywhere where no mask of that shape was recorded."""
    on = np.ones(shape, bool)
    for side in "ab":
        mask = context.values(side, Phase.BATCH, step, MASK, micro_batch)
        if mask is not None and mask.shape == shape:
            on &= mask != 0
    return on


def _padding(rows: Sequence[_Row]) -> _Form | None:
    """One side counts the padding before and between the tokens, the other does not."""
    for counting, other in (("a", "b"), ("b", "a")):
        start = int(rows[0].attended(other)[0])
        if all(
            (row.attended(counting) == start + row.columns).all()
            and (row.attended(other) == start + np.arange(row.columns.size)).all()
            for row in rows
        ):
            most = max(int((row.columns - np.arange(row.columns.size)).max()) for row in rows)
            return _Form(
                {"form": "padding", "counted_by": counting, "most": most},
                f"{counting} counts padding as positions, up to {most:,} in a row; {other} counts tokens only",
            )
    return None


def _restart(rows: Sequence[_Row]) -> _Form | None:
    """Both sides count from the same number on, and begin again at other places."""
    start = int(rows[0].attended("a")[0])
    begins: dict[str, set[tuple[int, int, int]]] = {"a": set(), "b": set()}
    for row in rows:
        for side in "ab":
            columns = _begins(row, side, start)
            if columns is None:
                return None
            begins[side] |= {(row.micro_batch, row.number, int(column)) for column in columns}
    at = sorted(begins["a"] ^ begins["b"])
    a, b = len(begins["a"]), len(begins["b"])
    parameters: dict[str, Any] = {"form": "restart", "begins_a": a, "begins_b": b}
    parameters["at"] = [list(place) for place in at[:MOST_LISTED]]
    where = f"the first at column {at[0][2]} of row {at[0][1]}"
    if a and b:
        times = f"{count(a, 'time')} in a, {count(b, 'time')} in b"
        return _Form(parameters, f"positions begin again at {start} at other places, {where}: {times}")
    some, other = ("a", "b") if a else ("b", "a")
    times = f"{count(a + b, 'time')}, {where}"
    return _Form(
        parameters, f"{some}'s positions begin again at {start} inside of rows ({times}); {other} counts through"
    )


def _begins(row: _Row, side: str, start: int) -> Ints | None:
    """Columns at which positions begin again at `start`; None if that is not what they do."""
    positions = row.attended(side)
    begins = np.array([0, *(np.flatnonzero(np.diff(positions) != 1) + 1)])
    if (positions[begins] != start).any() or (begins.size > 1 and positions.size < SHORTEST * begins.size):
        return None
    columns: Ints = row.columns[begins[1:]]
    return columns


def _offset(rows: Sequence[_Row]) -> _Form | None:
    """All are off by one constant."""
    found = np.unique(np.concatenate([row.attended("b") - row.attended("a") for row in rows]))
    if found.size != 1:
        return None
    offset = int(found[0])
    more, less = ("b", "a") if offset > 0 else ("a", "b")
    return _Form({"form": "offset", "offset": offset}, f"each position of {more} is {less}'s plus {abs(offset):,}")


FORMS: Final[tuple[Callable[[Sequence[_Row]], _Form | None], ...]] = (_padding, _restart, _offset)
