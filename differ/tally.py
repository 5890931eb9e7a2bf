"""Keep count: what was compared, what came of it, and what was found, as the engine walks through two traces.

Holds no opinion of its own: judges decide, this adds up.  Invariant: every aligned record is counted exactly once.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from differ.options import DiffOptions, Measurement
from differ.result import Before, Cause, Counts, Finding, Worst
from tracer.schema import Phase


@dataclass(slots=True)
class PhaseTally:
    """Records compared in one phase of one step, and the worst margin among them."""

    compared: int = 0
    margin: float = 0.0


@dataclass(slots=True)
class Tally:
    """Counts, findings and notes of a comparison in progress."""

    options: DiffOptions
    same_bits: int = 0
    within: int = 0
    propagated: int = 0
    diverged_pairs: int = 0
    unrecorded: int = 0
    steps: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[Cause] = field(default_factory=list)
    worst: Worst | None = None
    phases: dict[tuple[int, Phase], PhaseTally] = field(default_factory=dict)
    repeats: Counter[tuple[Phase, str]] = field(default_factory=Counter)
    # The first divergence in each phase that `phases` leaves out of the judgement.
    hidden: dict[Phase, Finding] = field(default_factory=dict)

    def same(self, step: int, phase: Phase, count: int = 1) -> None:
        """Records with the same bits."""
        if count and self.options.wants_phase(phase):
            self.same_bits += count
            self._phase(step, phase).compared += count

    def measured(self, measurement: Measurement, *, diverged: bool = False) -> None:
        """A judged record that differs in its bits; the caller adds the finding if it diverged."""
        if self.options.probe is not None:
            self.options.probe(measurement)
        if not self.options.wants_phase(measurement.phase):
            return
        if diverged:
            self.diverged_pairs += 1
        else:
            self.within += 1
        margin = ratio(measurement.observed, measurement.tolerance)
        phase = self._phase(measurement.step, measurement.phase)
        phase.compared += 1
        phase.margin = max(phase.margin, margin)
        if self.worst is None or margin > self.worst.margin:
            self.worst = Worst(margin, measurement.step, measurement.phase.label, measurement.name)

    def explained(self, phase: Phase, count: int = 1) -> None:
        """Records that differ because their inputs do."""
        if self.options.wants_phase(phase):
            self.propagated += count

    def repeated(self, phase: Phase, name: str) -> None:
        """A divergence that was found at an earlier step already."""
        if self.options.wants_phase(phase):
            self.propagated += 1
            self.repeats[phase, name] += 1

    def left_out(self, phase: Phase, count: int = 1) -> None:
        """Records that are in one file only without being a finding, or have no value in one."""
        if self.options.wants_phase(phase):
            self.unrecorded += count

    def find(self, finding: Finding) -> None:
        """Add a finding, or remember the first one of a phase that is left out."""
        phase = Phase.parse(finding.phase)
        if self.options.wants_phase(phase):
            self.findings.append(finding)
        elif phase not in self.hidden or causal_order(finding) < causal_order(self.hidden[phase]):
            self.hidden[phase] = finding

    def note(self, note: Cause) -> None:
        """Add a note."""
        self.notes.append(note)

    @property
    def compared(self) -> int:
        """Records that were judged."""
        return self.same_bits + self.within + self.diverged_pairs

    def counts(self) -> Counts:
        """The counts as a report shows them; `diverged` is the number of findings."""
        return Counts(
            self.steps, self.compared, self.same_bits, self.within, self.propagated, len(self.findings), self.unrecorded
        )

    def ordered(self) -> tuple[Finding, ...]:
        """Findings in causal order: step, phase, micro-batch, then the largest excess first."""
        return tuple(sorted(self.findings, key=causal_order))

    def before(self, first: Finding) -> Before:
        """What agrees before the first finding."""
        at = (first.step, Phase.parse(first.phase))
        earlier = {key: tally for key, tally in self.phases.items() if key < at}
        return Before(
            steps=len({step for step, _ in earlier if 0 < step < first.step}),
            # Before the first step there is only the state that it starts from.
            phases=tuple(p.label for step, p in sorted(earlier) if step == first.step or first.step == 1),
            records=sum(tally.compared for tally in earlier.values()),
            margin=max((tally.margin for tally in earlier.values()), default=0.0),
        )

    def _phase(self, step: int, phase: Phase) -> PhaseTally:
        return self.phases.setdefault((step, phase), PhaseTally())


def ratio(observed: float, allowed: float) -> float:
    """Observed over allowed; 0 for no difference at all, inf where nothing is allowed (nan counts as inf)."""
    if observed == 0.0:
        return 0.0
    quotient = observed / allowed if allowed > 0.0 else float("inf")
    return quotient if quotient == quotient else float("inf")


# Structure comes before numbers among the findings of one row.
_STRUCTURE: Final = {"missing_a": 0, "missing_b": 0, "shape": 1, "state": 2, "replica": 3, "nonfinite": 4, "value": 5}


def causal_order(finding: Finding) -> tuple[int, int, float, int, float, str]:
    """Sort key of findings: what comes first in the run comes first in the report."""
    # What a step accumulates comes after its micro-batches.
    micro_batch = math.inf if finding.micro_batch is None else finding.micro_batch
    excess = ratio(finding.required or 0.0, finding.tolerance or 0.0) if finding.required is not None else float("inf")
    return (
        finding.step,
        Phase.parse(finding.phase),
        micro_batch,
        _STRUCTURE[finding.kind],
        -excess,
        finding.name or "",
    )
