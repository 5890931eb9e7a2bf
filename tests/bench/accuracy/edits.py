"""Change records of a written trace: for faults that are damaged records, and for finding the smallest fault.

`rewrite` copies a trace row by row through a function; seals, digests and statistics are those of the new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tracer.reader import RowView, Trace, open_trace
from tracer.schema import Fingerprint, Record, Row, State
from tracer.writer import TraceWriter

Change = Callable[[Row], Row]


def rows_of(trace: Trace) -> Iterator[tuple[int, list[Row]]]:
    """The rows of a trace as they were handed to its writer, by step."""
    for step in trace.steps:
        yield step, [_row(view) for view in trace.rows() if view.step == step]


def _row(view: RowView) -> Row:
    return Row(view.phase, view.step, view.micro_batch, tuple(_record(view, i) for i in range(view.layout.records)))


def _record(view: RowView, i: int) -> Record:
    entry, state = view.layout.entries[i], view.state(i)
    shared: dict[str, Any] = {"original": entry.original, "transform": entry.transform}
    if entry.alias_of:
        return Record(
            entry.name, None, entry.dtype, entry.shape, stored=False, alias_of=entry.alias_of, state=state, **shared
        )
    if not entry.stored or state in (State.NONE, State.UNRECORDED):
        kept = Fingerprint(view.digests[i].tobytes(), view.stats[i])
        return Record(
            entry.name, None, entry.dtype, entry.shape, stored=entry.stored, state=state, fingerprint=kept, **shared
        )
    return Record(entry.name, view.read(i).copy(), entry.dtype, entry.shape, **shared)


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """Copy a trace with its rows changed."""
    with open_trace(source) as trace:
        writer = TraceWriter(target, env=trace.env, declared=trace.declared, overwrite=True)
        for step, rows in rows_of(trace):
            writer.write_step(step, [change(row) for row in rows], trace.observed if step <= 1 else None)
        writer.finish()
    return target


def edit_file(source: Path, target: Path, edit: Mapping[str, Any]) -> Path:
    """Add `by` to one element of one record."""

    def change(row: Row) -> Row:
        if (row.step, row.phase.label) != (edit["step"], edit["phase"]):
            return row
        return replace(row, records=tuple(_add(r, edit) if r.name == edit["name"] else r for r in row.records))

    return rewrite(source, target, change)


def _add(record: Record, edit: Mapping[str, Any]) -> Record:
    assert record.data is not None
    data = np.array(record.data)
    data.flat[edit["flat"]] += edit["by"]
    return replace(record, data=data)
