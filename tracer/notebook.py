"""A trace in a notebook: what it shows of itself, and its statistics as a pandas table.  Reads tables only, no tensor."""

from __future__ import annotations

import html
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from tracer.errors import PackageMissing
from tracer.schema import STATS, WHOLE_STEP, Phase

if TYPE_CHECKING:
    from tracer.reader import Trace

# Losses that the summary lists; the rest is counted.
_MOST: Final = 12


def summary(trace: Trace) -> str:
    """A trace as a small piece of HTML: file, steps, phases, settings, losses.  All that comes from the file is escaped."""
    end = "finished" if trace.finished else f"UNFINISHED: {trace.end.get('reason') or 'cut off'}"
    kind = "fingerprint" if trace.fingerprint else "trace"
    head = f"{trace.path.name}: {kind}, steps {trace.steps[0]} to {trace.last_step}, {end}"
    phases = [(phase.label, sum(1 for _ in trace.rows(phase)), _records(trace, phase)) for phase in trace.phases]
    parts = [f"<p><b>{_text(head)}</b></p>", _table(("phase", "rows", "records"), phases)]
    losses = list(_losses(trace))
    if losses:
        parts.append(_table(("step", "loss"), losses[:_MOST]))
        if len(losses) > _MOST:
            parts.append(f"<p>… {len(losses) - _MOST} more steps</p>")
    settings = sorted({**trace.observed, **trace.declared}.items())
    if settings:
        rows = [(key, _cut(value)) for key, value in settings]
        parts.append(f"<details><summary>{len(rows)} settings</summary>{_table(('setting', 'value'), rows)}</details>")
    return "<div>" + "".join(parts) + "</div>"


def dataframe(trace: Trace) -> Any:
    """One line a record (step, phase, micro-batch, name, dtype, shape, state, statistics) as a pandas DataFrame.

    Raises PackageMissing without pandas.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise PackageMissing("pandas is not installed", "pip install pandas") from error
    columns = ("step", "phase", "micro_batch", "name", "dtype", "shape", "state", *STATS)
    table = pandas.DataFrame(list(_lines(trace)), columns=list(columns))
    labels = [phase.label for phase in Phase]
    table["phase"] = pandas.Categorical(table["phase"], categories=labels, ordered=True)
    return table


def _lines(trace: Trace) -> Iterator[tuple[Any, ...]]:
    for row in trace.rows():
        stats = row.stats
        for i, entry in enumerate(row.layout.entries):
            numbers = (float(value) for value in stats[i])
            yield (
                row.step, row.phase.label, None if row.micro_batch == WHOLE_STEP else row.micro_batch, entry.name,
                entry.dtype, entry.shape, row.state(i).label, *numbers,
            )  # fmt: skip


def _losses(trace: Trace) -> Iterator[tuple[int, str]]:
    from tracer.export import scalars

    for point in scalars(trace):
        if point.tag == "loss":
            yield point.step, f"{point.value:.6g}"


def _records(trace: Trace, phase: Phase) -> int:
    return max(row.layout.records for row in trace.rows(phase))


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _text(value: object) -> str:
    return html.escape(str(value))
