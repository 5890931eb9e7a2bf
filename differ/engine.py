"""Compare two traces: align, compare, judge, locate, explain, step by step, one record in memory at a time.

Order is causal: steps, then phases, then micro-batches.  Rows with equal seals hold the same bits and are not read, not
even their index; records with equal digests are not read either.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from differ.align import Rows
from differ.causes import explain
from differ.causes.context import Context
from differ.fingerprint import note_fingerprints
from differ.inputs import Inputs
from differ.judges import left_out
from differ.options import DiffOptions
from differ.result import Cause, DiffResult, Finding, Kind, PolicyUsed, Side, Verdict
from differ.rows import compare_rows, missing_row
from differ.runs import label, model_dtype
from differ.session import RowPair, Session
from differ.tally import Tally
from tracer.dtypes import coarser
from tracer.reader import Trace, open_trace
from tracer.schema import WHOLE_STEP, Phase

if TYPE_CHECKING:
    from differ.collect import Collector
    from differ.noise import NoiseFloor

Source = str | os.PathLike[str] | Trace

PHASES = tuple(phase for phase in Phase if phase is not Phase.CONFIG)


def diff(a: Source, b: Source, options: DiffOptions | None = None) -> DiffResult:
    """Compare two traces, given as paths or open.

    Raises a `tracer.errors.TraceError` for a file that cannot be read, and Damaged for one whose bytes do not match their
    digests.  Traces with nothing in common give the verdict `incomparable`, not an error.
    """
    with ExitStack() as stack:
        first, second = (
            source if isinstance(source, Trace) else stack.enter_context(open_trace(Path(source))) for source in (a, b)
        )
        options = options or DiffOptions()
        twins = [stack.enter_context(open_trace(Path(path))) for path in options.noise]
        if first.of_ranks or second.of_ranks:
            from differ.ranks import settle, settle_twin

            first, second = settle(first, second)
            twins = [settle_twin(twin, (first, second)) for twin in twins]
        # Runs that went to nan are compared like any other; every measure here says itself what is not finite.
        with np.errstate(all="ignore"):
            return _Engine(first, second, options, twins).run()


class _Engine:
    """One comparison from start to end."""

    def __init__(self, a: Trace, b: Trace, options: DiffOptions, twins: Sequence[Trace]) -> None:
        rows = Rows(a, options.rules), Rows(b, options.rules)
        self.collector = _collector(options)
        if self.collector is not None:
            options = replace(options, probe=self.collector.measured)
        self.a, self.b, self.options = a, b, options
        self.tally = Tally(options)
        dtype = coarser(model_dtype(a), model_dtype(b))
        self.session = Session(*rows, options, self.tally, dtype, Inputs(*rows), _noise_floor(twins, rows, options))

    def run(self) -> DiffResult:
        """Walk through the steps and put the result together."""
        self._note_phases()
        note_fingerprints(self.session)
        if self.a.of_ranks or self.b.of_ranks:
            from differ.ranks import note_ranks

            note_ranks(self.session)
        end = self._common_end()
        steps = [step for step in sorted({*self.a.steps, *self.b.steps}) if self.options.wants_step(step)]
        for done, step in enumerate(steps):
            self._tell_progress(done, len(steps))
            if step > end:
                self._count_rest(step)
            elif step in self.a.steps and step in self.b.steps:
                self._compare_step(step)
            else:
                self._find_missing_step(step)
        self._tell_progress(len(steps), len(steps))
        return self._result()

    def _tell_progress(self, done: int, total: int) -> None:
        if self.options.progress is not None:
            self.options.progress(done, total)

    def _compare_step(self, step: int) -> None:
        self.session.step_blocked = False
        self.tally.steps += step > 0
        for phase in PHASES:
            in_a, in_b = self.a.micro_batches(phase, step), self.b.micro_batches(phase, step)
            # What a step accumulates comes after its micro-batches.
            for micro_batch in sorted({*in_a, *in_b}, key=lambda number: (number == WHOLE_STEP, number)):
                self._compare_row(phase, step, micro_batch)

    def _compare_row(self, phase: Phase, step: int, micro_batch: int) -> None:
        a, b = self.session.a.get(phase, step, micro_batch), self.session.b.get(phase, step, micro_batch)
        if a is not None and b is not None:
            pair = RowPair(phase, step, micro_batch, a, b)
            self._find_drift(pair)
            compare_rows(self.session, pair)
        elif (present := a or b) is not None:
            missing_row(self.session, present, in_a=a is not None)
        if self.collector is not None:
            self.collector.row(phase, step, a, b, self.tally)

    def _find_drift(self, pair: RowPair) -> None:
        if pair.a.view.drifts or pair.b.view.drifts:
            from differ.ranks import find_drift

            find_drift(self.session, pair)

    def _common_end(self) -> int:
        """The last step to compare: an unfinished trace ends where it ends, and that is no finding."""
        ends = [trace.last_step for trace in (self.a, self.b) if not trace.finished]
        return min(ends, default=max(self.a.last_step, self.b.last_step))

    def _count_rest(self, step: int) -> None:
        for trace in (self.a, self.b):
            for phase in PHASES:
                for micro_batch in trace.micro_batches(phase, step):
                    row = trace.row(phase, step, micro_batch)
                    self.tally.left_out(phase, row.layout.records if row is not None else 0)

    def _find_missing_step(self, step: int) -> None:
        trace, kind = (self.a, Kind.MISSING_B) if step in self.a.steps else (self.b, Kind.MISSING_A)
        phases = [phase for phase in PHASES if trace.micro_batches(phase, step)]
        phase = next(iter(sorted(phases, key=lambda one: not self.options.wants_phase(one))), None)
        if phase is None:
            return
        known = not self.session.first_time("step", kind)
        if known:
            self.tally.repeated(phase, "")
            return
        other = self.b if kind is Kind.MISSING_B else self.a
        side = "b" if kind is Kind.MISSING_B else "a"
        detail = f"{side} has no step {step}; it has {_span(other.steps)}"
        self.tally.find(Finding(step, phase.label, None, kind, detail=detail))

    def _note_phases(self) -> None:
        """Phases that one side did not record at all, and a side that was cut off."""
        for side, trace, other in (("a", self.a, self.b), ("b", self.b, self.a)):
            for phase in sorted(set(trace.phases) - set(other.phases)):
                lacks = "b" if side == "a" else "a"
                summary = f"{phase.label} is recorded in {side} only; {lacks} was not asked for it, or has none"
                self.tally.note(Cause("phase.unrecorded", summary, side=lacks, phase=phase.label))
            if not trace.finished:
                reason = str(trace.end.get("reason") or "it was cut off")
                summary = f"{side} is unfinished: ends after step {trace.last_step} ({reason})"
                self.tally.note(Cause("unfinished", summary, side=side, step=trace.last_step))

    def _result(self) -> DiffResult:
        for about, summary in self.session.noise.remarks() if self.session.noise is not None else ():
            self.tally.note(Cause(about, summary))
        findings = self.tally.ordered()
        first = findings[0] if findings else None
        verdict = Verdict.DIVERGED if findings else Verdict.SAME
        # Where everything is explained by what was not asked about, nothing was compared.
        if self.tally.compared == 0 and not (findings and self.tally.propagated):
            verdict = Verdict.INCOMPARABLE
            self.tally.note(_why_nothing(self.a, self.b, self.options))
        context = Context(self.session.a, self.session.b, findings, tuple(self.tally.notes), self.options.policy)
        explanation = explain(context, verdict)
        worst = self.tally.worst
        before = self.tally.before(first) if first is not None else None
        if before is not None and first is not None and 0 < first.step <= 1 and not explanation.settings:
            before = replace(before, phases=(Phase.CONFIG.label, *before.phases))
        return DiffResult(
            a=_side(self.a),
            b=_side(self.b),
            policy=self._policy_used(),
            verdict=verdict,
            first=first,
            causes=explanation.causes,
            notes=(*left_out.note(self.session), *self.tally.notes, *self._repeats(), *explanation.notes),
            counts=self.tally.counts(),
            margin=worst.margin if worst is not None else 0.0,
            worst=worst,
            before=before,
            findings=findings,
            series=None if self.collector is None else self.collector.build(findings),
            reference=None if self.options.reference is None else self.options.reference.judged(self.options.policy),
        )

    def _policy_used(self) -> PolicyUsed:
        noise = tuple(os.fspath(path) for path in self.options.noise)
        return PolicyUsed(self.options.policy.file or None, self.session.dtype, noise)

    def _repeats(self) -> list[Cause]:
        """One note a phase for what was found once and goes on."""
        notes = []
        for phase in PHASES:
            names = sorted(name for (at, name), _ in self.tally.repeats.items() if at is phase)
            if names:
                total = sum(count for (at, _), count in self.tally.repeats.items() if at is phase)
                summary = f"{phase.label}: the divergence goes on, {total:,} more records differ"
                parameters = {"records": total}
                notes.append(Cause("repeated", summary, phase=phase.label, names=tuple(names), parameters=parameters))
        return notes


# What only some comparisons need is imported by them: a `trace diff` of two small traces takes mostly its imports.


def _collector(options: DiffOptions) -> Collector | None:
    if not options.series:
        return None
    from differ.collect import Collector

    return Collector(options)


def _why_nothing(a: Trace, b: Trace, options: DiffOptions) -> Cause:
    from differ.nothing import why

    return why(a, b, options)


def _noise_floor(twins: Sequence[Trace], rows: tuple[Rows, Rows], options: DiffOptions) -> NoiseFloor | None:
    if not twins:
        return None
    from differ.noise import NoiseFloor

    return NoiseFloor([Rows(twin, options.rules) for twin in twins], *rows, options.policy.noise.quantile)


def _side(trace: Trace) -> Side:
    updates = sum(1 for step in trace.steps if step > 0)
    return Side(
        str(trace.path),
        label(trace),
        trace.tool,
        trace.format,
        trace.finished,
        updates,
        trace.last_step,
        model_dtype(trace),
    )


def _span(steps: tuple[int, ...]) -> str:
    """Steps in words: `steps 0 to 3`."""
    gaps = len(steps) != steps[-1] - steps[0] + 1
    return f"{len(steps)} steps between {steps[0]} and {steps[-1]}" if gaps else f"steps {steps[0]} to {steps[-1]}"
