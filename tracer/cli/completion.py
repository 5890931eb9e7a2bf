"""What the shell offers for the arguments of `trace show`: steps, phases and names that are in the file.

Reads the tables of steps and rows and an index, never a tensor.  A file that cannot be read offers nothing: a completion
must not print, and the command itself will say what is wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from tracer.errors import TraceError
from tracer.reader import Trace, open_trace
from tracer.schema import Phase


def complete_step(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Steps of the file."""
    return _offer(ctx, incomplete, lambda trace: map(str, trace.steps))


def complete_phase(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Phases that were recorded at the step."""
    step = ctx.params.get("step")
    return _offer(
        ctx, incomplete, lambda trace: (p.label for p in trace.phases if trace.micro_batches(p, _number(step)))
    )


def complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Records of the phase at the step."""
    return _offer(ctx, incomplete, lambda trace: _names(trace, ctx.params.get("step"), ctx.params.get("phase")))


def _names(trace: Trace, step: object, label: object) -> Iterator[str]:
    phase = Phase.parse(str(label))
    for micro_batch in trace.micro_batches(phase, _number(step))[:1]:
        row = trace.row(phase, _number(step), micro_batch)
        if row is not None:
            yield from (entry.name for entry in row.layout.entries)


def _offer(ctx: click.Context, incomplete: str, words: Callable[[Trace], Iterator[str]]) -> list[CompletionItem]:
    path = ctx.params.get("file")
    if path is None:
        return []
    with contextlib.suppress(TraceError, KeyError, ValueError), open_trace(Path(path)) as trace:
        return [CompletionItem(word) for word in words(trace) if word.startswith(incomplete)]
    return []


def _number(step: object) -> int:
    return int(str(step))
