"""`trace show`: what is in a trace, from the whole file down to one tensor's values.

Everything but the values of a single record comes from the index and the statistics, so it is quick for any size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from tracer.cli.completion import complete_name, complete_phase, complete_step
from tracer.dtypes import to_numpy
from tracer.errors import BadUsage
from tracer.names import nearest
from tracer.reader import RowView, Trace, open_trace
from tracer.schema import POSITIONS, SKETCH_BUCKETS, STATS, WHOLE_STEP, Phase, State
from tracer.shards import piece_of, without_piece
from tracer.size import human_bytes

# Of a module's output, so many of the positions that its rows are at are listed.
SHOWN_PLACES: Final = 12


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("step", required=False, type=int, shell_complete=complete_step)
@click.argument("phase", required=False, shell_complete=complete_phase)
@click.argument("name", required=False, shell_complete=complete_name)
def show(file: Path, step: int | None, phase: str | None, name: str | None) -> None:
    """What is in the trace FILE: an overview, a STEP, a PHASE of it, or the values of the record NAME.

    \b
    trace show run.h5
    trace show run.h5 1
    trace show run.h5 1 grad
    trace show run.h5 1 grad model.layers.0.self_attn.q_proj.lora_B.weight
    """
    with open_trace(file) as trace:
        for line in _lines(trace, step, phase, name):
            click.echo(line)


def _lines(trace: Trace, step: int | None, phase: str | None, name: str | None) -> Iterator[str]:
    if step is None:
        return _overview(trace)
    if step not in trace.steps:
        raise BadUsage(f"{trace.path} has no step {step}", f"it has steps {_ranges(trace.steps)}")
    if phase is None:
        return _step(trace, step)
    rows = _rows(trace, step, phase)
    return _table(rows) if name is None else _values(rows, name)


def _rows(trace: Trace, step: int, label: str) -> list[RowView]:
    try:
        phase = Phase.parse(label)
    except KeyError as error:
        raise BadUsage(f"{label!r} is no phase", f"phases are {', '.join(p.label for p in Phase)}") from error
    rows = [row for m in trace.micro_batches(phase, step) if (row := trace.row(phase, step, m))]
    if not rows:
        here = ", ".join(sorted({row.phase.label for row in trace.rows() if row.step == step}))
        raise BadUsage(f"{trace.path} has no {label} at step {step}", f"it has {here or 'nothing'} there")
    return rows


def _overview(trace: Trace) -> Iterator[str]:
    end = "finished" if trace.finished else f"UNFINISHED: {trace.end.get('reason') or 'cut off'}"
    yield f"{trace.path}: {human_bytes(trace.size)}, format {trace.format}, written by {trace.tool}"
    yield f"steps  {_ranges(trace.steps)}, {end}"
    thinned = trace.sketched_steps
    if thinned and len(thinned) < len(trace.steps) - 1:
        held = tuple(step for step in trace.steps if step not in thinned)
        yield f"       tensors at {_ranges(held)}; digests, statistics and sketches at the others"
    yield ""
    yield f"{'phase':<14}{'rows':>6}{'records':>9}{'a row':>10}  states at its last step"
    for phase in trace.phases:
        rows = list(trace.rows(phase))
        states = Counter(State(int(s)).label for s in rows[-1].states)
        text = ", ".join(f"{count} {label}" for label, count in sorted(states.items()))
        size = sum(_bytes(row) for row in rows) / len(rows)
        yield f"{phase.label:<14}{len(rows):>6}{rows[-1].layout.records:>9}{human_bytes(size):>10}  {text}"
    for title, document in (("declared", trace.declared), ("observed", trace.observed), ("env", trace.env)):
        if document:
            yield ""
            yield title
            yield from _settings(document)


def _settings(document: dict[str, Any]) -> Iterator[str]:
    width = min(36, max(map(len, document)))
    for key, value in sorted(document.items()):
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        yield f"  {key:<{width}}  {text if len(text) <= 160 else text[:157] + '...'}"


def _step(trace: Trace, step: int) -> Iterator[str]:
    yield f"{trace.path}, step {step}"
    yield f"{'phase':<14}{'micro-batch':>12}{'records':>9}{'global l2':>14}{'nan':>6}{'inf':>6}  transforms"
    for row in trace.rows():
        if row.step == step:
            stats = row.stats
            micro = "" if row.micro_batch == WHOLE_STEP else str(row.micro_batch)
            alias = sum(1 for entry in row.layout.entries if entry.alias_of)
            turned = sum(1 for entry in row.layout.entries if without_piece(entry.transform))
            sharded = sum(1 for entry in row.layout.entries if piece_of(entry.transform) is not None)
            notes = (
                [f"{turned} transposed"] * (turned > 0)
                + [f"{sharded} sharded"] * (sharded > 0)
                + [f"{alias} by reference"] * (alias > 0)
            )
            l2 = math.sqrt(float((stats[:, 0] ** 2).sum()))
            nan, inf = int(stats[:, 4].sum()), int(stats[:, 5].sum())
            yield (
                f"{row.phase.label:<14}{micro:>12}{row.layout.records:>9}{l2:>14.6g}{nan:>6}{inf:>6}  {', '.join(notes)}"
            ).rstrip()


def _table(rows: Sequence[RowView]) -> Iterator[str]:
    for row in rows:
        yield row.address()
        width = max((len(entry.name) for entry in row.layout.entries), default=4)
        yield f"  {'name':<{width}}  {'shape':<12}{'dtype':<10}{'state':<11}" + "".join(f"{s:>12}" for s in STATS)
        for i, entry in enumerate(row.layout.entries):
            numbers = "".join(f"{value:>12.5g}" for value in row.stats[i])
            shape = "x".join(map(str, entry.shape)) or "scalar"
            held = "sketch" if row.sketched(i) else "digest"
            state = row.state(i).label if row.stored(i) or row.state(i) is not State.VALUE else held
            yield f"  {entry.name:<{width}}  {shape:<12}{entry.dtype:<10}{state:<11}{numbers}"


def _values(rows: Sequence[RowView], name: str) -> Iterator[str]:
    found = False
    for row in rows:
        i = row.layout.positions.get(name)
        if i is None:
            continue
        found = True
        entry = row.layout.entries[i]
        yield f"{name}, {row.address()}"
        yield f"  {entry.dtype} [{', '.join(map(str, entry.shape))}], {row.state(i).label}"
        piece = piece_of(entry.transform)
        words = [entry.original, *["transposed"] * bool(without_piece(entry.transform))]
        if piece is not None:
            words.append(f"the part from {list(piece.start)} on of {list(piece.whole)}")
        yield f"  original {', '.join(words)}"
        if entry.alias_of:
            yield f"  same bytes as {entry.alias_of}"
        yield f"  digest {row.digests[i].tobytes().hex()}"
        yield from _places(row, name)
        yield "  " + "  ".join(f"{stat} {value:.9g}" for stat, value in zip(STATS, row.stats[i], strict=True))
        if row.stored(i) and row.state(i) in (State.VALUE, State.ZERO):
            with np.printoptions(precision=9, threshold=200, edgeitems=4, linewidth=120):
                yield str(to_numpy(row.read(i), entry.dtype))
        else:
            held = "digest, statistics and sketch" if row.sketched(i) else "digest and statistics"
            yield f"  the file holds its {held}, not its values"
    if not found:
        known = [entry.name for row in rows for entry in row.layout.entries]
        close = nearest(name, known)
        raise BadUsage(f"{rows[0].address()} has no record {name}", f"nearest: {', '.join(close)}" if close else "")


def _places(row: RowView, name: str) -> Iterator[str]:
    """Where in the batch the rows of a module's output are from."""
    at = row.layout.positions.get(POSITIONS)
    if row.phase is not Phase.FORWARD or at is None or name == POSITIONS or not row.stored(at):
        return
    places = [f"({batch_row}, {position})" for batch_row, position in row.read(at).tolist()]
    shown = places if len(places) <= SHOWN_PLACES else [*places[: SHOWN_PLACES - 1], "…", places[-1]]
    yield f"  rows are at (row, position) of the batch: {', '.join(shown)}"


def _bytes(row: RowView) -> int:
    from tracer.dtypes import DTYPES

    entries = row.layout.entries
    sketches = 4 * SKETCH_BUCKETS * sum(entry.sketched for entry in entries)
    stored = (entry for entry in entries if entry.dataset and not entry.sketched)
    return sketches + sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in stored)


def _ranges(steps: Sequence[int]) -> str:
    """`0–10, 20`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)
