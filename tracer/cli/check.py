"""`trace check`: read every byte of a trace and say what does not match, and what was lost.

Verifies the seals, every index, document, digest and statistic.  A run of several ranks is also checked for
replicas that drift: records that all ranks should hold alike.  Exit code 0: whole and finished; 2: not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np

from tracer.errors import Damaged
from tracer.packing import statistics
from tracer.reader import RowView, Trace, open_trace
from tracer.schema import DOCUMENTS, State

# Records that drift are listed up to this many.
MOST_DRIFTS: Final = 20


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check_trace` found: problems, one line each, and how many records it verified."""

    problems: tuple[str, ...]
    records: int


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> int:
    """Is the trace FILE whole: reads all of it, verifies every digest, and says what was lost.

    \b
    trace check run.h5
    """
    with _opened(file) as trace:
        checked = [check_trace(part) for part in trace.parts]
        problems = tuple(problem for one in checked for problem in one.problems)
        result = Checked(problems, sum(one.records for one in checked))
        steps = f"steps {trace.steps[0]}–{trace.last_step}"
        for problem in result.problems:
            click.echo(f"  {problem}")
        if result.problems:
            click.echo(
                f"DAMAGED  {file}: {len(result.problems)} problems; {steps} are listed, {result.records} records are good"
            )
            return 2
        drifts = list(itertools.islice(trace.drifts(), MOST_DRIFTS + 1))
        if drifts:
            for row, drift in drifts[:MOST_DRIFTS]:
                click.echo(f"  {row.address()}, {drift.name}: rank {drift.rank} differs from rank 0")
            more = "more than " * (len(drifts) > MOST_DRIFTS)
            count = min(len(drifts), MOST_DRIFTS)
            click.echo(
                f"DRIFTED  {file}: ranks hold different values from {drifts[0][0].address()} on, in {more}{count} records"
            )
            return 2
        if not trace.finished:
            reason = trace.end.get("reason") or "cut off"
            lost = f"whatever came after step {trace.last_step} is missing"
            click.echo(f"UNFINISHED  {file}: {steps} are whole ({result.records} records verified); {lost} ({reason})")
            return 2
        click.echo(f"WHOLE  {file}: {steps}, {result.records} records verified")
    return 0


def _opened(file: Path) -> Trace:
    try:
        return open_trace(file)
    except Damaged as error:
        # The usual advice is to run this command.
        raise Damaged(str(error), "nothing can be read of it; record it again") from error


def check_trace(trace: Trace) -> Checked:
    """Verify everything in a trace.  Damage to one record does not hide that to others."""
    problems = list(_document_problems(trace))
    good = 0
    for row in trace.rows():
        try:
            states, entries = row.states, row.layout.entries
        except Damaged as error:
            problems.append(str(error))
            continue
        for i in range(len(entries)):
            problem = _record_problem(row, i, State(int(states[i])))
            if problem:
                problems.append(problem)
            else:
                good += 1
    return Checked(tuple(problems), good)


def _document_problems(trace: Trace) -> Iterator[str]:
    for name in DOCUMENTS:
        try:
            trace.document(name)
        except Damaged as error:
            yield str(error)


def _record_problem(row: RowView, i: int, state: State) -> str:
    entry = row.layout.entries[i]
    if state not in (State.VALUE, State.ZERO):
        return ""
    try:
        if entry.alias_of:
            # The bytes are verified where they are.
            target, position = row.target(i)
            same = row.digests[i] == target.digests[position]
            return "" if same else f"{entry.name} at {row.address()} refers to other bytes than it had"
        if entry.sketched:
            row.read_sketch(i)
        if not entry.stored:
            return ""
        values = row.read(i)
        expected = statistics(values.reshape(-1), entry.dtype)
        same = np.array_equal(row.stats[i], expected, equal_nan=True) or np.allclose(row.stats[i], expected, rtol=1e-9)
    except Damaged as error:
        return str(error)
    return "" if same else f"{entry.name} at {row.address()}: its statistics are not those of its values"
