"""Turn a trace into a fingerprint: the same records, with sketches in place of tensors, small enough for git.

What decides by being equal or not stays as it is: settings, losses, small batches, counters.  Every digest, state and
statistic is carried over unchanged, so a record that equals its original is still known to, to the bit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tracer.reader import RowView, Trace, open_trace
from tracer.schema import Fingerprint, Phase, Record, Row, State
from tracer.sketch import sketch
from tracer.thinning import keeps_values
from tracer.writer import TraceWriter


def shrink(
    trace: Trace,
    output: Path,
    *,
    what: frozenset[Phase] | None = None,
    steps: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the fingerprint of an open trace to `output`; `what` and `steps` leave phases and steps out (init stays).

    Raises a TraceError: what cannot be read, written, or exists already.
    """
    phases = frozenset(Phase) if what is None else what | {Phase.INIT}
    writer = TraceWriter(output, env=trace.env, declared=trace.declared, overwrite=overwrite)
    finished, reason = False, "shrinking was cut off"
    try:
        for step, views in itertools.groupby(trace.rows(), key=lambda row: row.step):
            if step == 0 or steps is None or steps[0] <= step <= steps[1]:
                _write(writer, step, [_row(row, phases) for row in views if row.phase in phases], trace)
        finished, reason = trace.finished, str(trace.end.get("reason", ""))
    finally:
        writer.finish(finished=finished, reason=reason)


def shrink_in_place(path: Path) -> None:
    """Replace a trace by its fingerprint; the file is the one or the other at any moment."""
    with open_trace(path) as trace, replacing(path) as part:
        shrink(trace, part, overwrite=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` that takes its place when the block ends well, and is removed when it does not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write(writer: TraceWriter, step: int, rows: list[Row], trace: Trace) -> None:
    """One step; its eval rows can only follow a commit of the step itself."""
    evals = [row for row in rows if row.phase is Phase.EVAL]
    writer.write_step(step, [row for row in rows if row.phase is not Phase.EVAL], trace.observed if step else None)
    if evals:
        writer.write_step(step, evals)


def _row(row: RowView, phases: frozenset[Phase]) -> Row:
    records = tuple(_record(row, i, phases) for i in range(row.layout.records))
    return Row(row.phase, row.step, row.micro_batch, records)


def _record(row: RowView, i: int, phases: frozenset[Phase]) -> Record:
    """A record as the fingerprint keeps it: a reference, its values, a sketch, or what there was of it."""
    # A digest that was put together from those of parts cannot be compared with that of a whole tensor.
    entry, state = row.layout.entries[i], row.state(i) if row.exact_digest(i) else State.UNRECORDED
    head = (entry.name, None, entry.dtype, entry.shape, entry.original, entry.transform)
    if entry.alias_of:
        if Phase.parse(entry.alias_of.partition("/")[0]) in phases:
            return Record(*head, alias_of=entry.alias_of, stored=False, state=state)
        # What it refers to is left out: it stands for itself.
        target, position = row.target(i)
        itself = _record(target, position, phases)
        return replace(itself, name=entry.name, original=entry.original, transform=entry.transform)
    digest, stats = row.digests[i].tobytes(), row.stats[i]
    if entry.sketched:
        return Record(*head, stored=False, state=state, fingerprint=Fingerprint(digest, stats, row.read_sketch(i)))
    if not entry.stored or 0 in entry.shape:
        return Record(*head, stored=entry.stored, state=state, fingerprint=Fingerprint(digest, stats))
    if keeps_values(row.phase, entry.dtype, entry.shape):
        data = row.read(i) if state in (State.VALUE, State.ZERO) else None
        return Record(entry.name, data, *head[2:], state=state)
    return Record(
        *head, stored=False, state=state, fingerprint=Fingerprint(digest, stats, sketch(row.read(i), entry.dtype))
    )
