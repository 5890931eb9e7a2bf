"""The sentences of a report, the same in every form: terminal, markdown, HTML, JUnit, annotations.

Pure functions of a `DiffResult`: they choose words and round numbers, nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from differ.result import Cause, DiffResult, Finding, Kind, Shown, Verdict

if TYPE_CHECKING:
    from differ.reference import ReferenceSide

CONFIG: Final = "config.differs"
LEFT_OUT: Final = "phases.left_out"
# Notes that a short report leaves out: which rule a phase follows, and that a divergence goes on.
QUIET_NOTES: Final = (CONFIG, "rule", "repeated")


def headline(result: DiffResult) -> str:
    """The first line: the verdict, and where."""
    if result.verdict is Verdict.DIVERGED:
        return f"DIVERGED at {address(result.first)}"
    return _same(result) if result.verdict is Verdict.SAME else "INCOMPARABLE  nothing was compared"


def _same(result: DiffResult) -> str:
    counts = result.counts
    text = f"SAME  {plural(counts.steps, 'step')}, {plural(counts.compared, 'record')} compared, {counts.same_bits:,} same bits"
    if result.worst is not None and counts.within:
        text += f"; worst {short(result.worst.margin)} of tolerance at step {result.worst.step} {result.worst.phase}"
    return text


def address(finding: Finding | None) -> str:
    """`step 1, batch, micro-batch 0, input_ids`."""
    if finding is None:
        return "no step"
    micro_batch = "" if finding.micro_batch is None else f", micro-batch {finding.micro_batch}"
    name = "" if finding.name is None else f", {finding.name}"
    return f"step {finding.step}, {finding.phase}{micro_batch}{name}"


def describe(finding: Finding) -> str:
    """A finding in words, without its address."""
    if finding.kind is Kind.REPLICA:
        return finding.detail
    if finding.kind in (Kind.MISSING_A, Kind.MISSING_B):
        side = "a" if finding.kind is Kind.MISSING_A else "b"
        return finding.detail or f"missing in {side}"
    if finding.kind in (Kind.SHAPE, Kind.STATE):
        text = f"{finding.kind}: a {value(finding.a)}, b {value(finding.b)}"
        return f"{text}; {finding.detail}" if finding.detail else text
    parts = [finding.detail] if finding.detail else []
    if finding.kind is Kind.NONFINITE:
        parts.append("nan or inf on one side only")
    elif finding.rel_l2 is not None and finding.tolerance is not None:
        # A replay is judged by what it misses, not by how far the sides are apart: its tolerance is no measure of that.
        allowed = f" (tolerance {short(finding.tolerance)})" if finding.required == finding.rel_l2 else ""
        parts.append(f"relative error {short(finding.rel_l2)}{allowed}")
    if finding.index is not None:
        at = f" at {list(finding.index)}" if finding.index else ""
        parts.append(f"a {value(finding.a)}, b {value(finding.b)}{at}")
    return "; ".join(parts)


def explained(cause: Cause, finding: Finding | None = None) -> str:
    """A cause with the share of the difference that it explains, and with its address if it is not about `finding`."""
    text = f"{elsewhere(cause, finding)}{cause.summary}"
    return text if cause.explains is None else f"{text} (explains {share(cause)} of the difference)"


def elsewhere(cause: Cause, finding: Finding | None) -> str:
    """`step 1, grad: ` before a cause that belongs to another step or phase than the finding that it is printed with."""
    if finding is None or cause.id == CONFIG or cause.step is None or cause.phase is None:
        return ""
    return "" if (cause.step, cause.phase) == (finding.step, finding.phase) else f"step {cause.step}, {cause.phase}: "


def share(cause: Cause) -> str:
    """Share of the difference that a cause explains: `99.9 %`."""
    return "" if cause.explains is None else f"{100 * cause.explains:.1f} %"


def causes(result: DiffResult) -> list[Cause]:
    """The causes without the settings."""
    return [cause for cause in result.causes if cause.id != CONFIG]


def settings(result: DiffResult) -> list[Cause]:
    """The settings that differ, as causes or, where nothing diverged, as notes."""
    return [cause for cause in (*result.causes, *result.notes) if cause.id == CONFIG]


def notes(result: DiffResult) -> list[Cause]:
    """The notes of a short report."""
    return [cause for cause in result.notes if cause.id not in QUIET_NOTES]


def left_out(result: DiffResult) -> list[str]:
    """Which phases were judged and which were not; empty where all were."""
    return [cause.summary for cause in result.notes if cause.id == LEFT_OUT]


def nearest(finding: Finding) -> str:
    """Names on the other side that look like a missing one; empty if there are none."""
    if not finding.nearest:
        return ""
    side = "a" if finding.kind is Kind.MISSING_A else "b"
    return f"nearest in {side}: {', '.join(finding.nearest)}"


def before(result: DiffResult) -> str:
    """What agrees before the first finding; empty if nothing comes before it."""
    seen = result.before
    if seen is None or not seen.records:
        return ""
    steps = [plural(seen.steps, "whole step")] if seen.steps else []
    parts = [*steps, *seen.phases] or ["step 0"]
    verb = "agrees" if len(parts) == 1 and seen.steps <= 1 else "agree"
    worst = f"worst {short(seen.margin)} of tolerance" if seen.margin else "no difference"
    return f"{', '.join(parts)} {verb} ({plural(seen.records, 'record')}, {worst})"


def also(result: DiffResult) -> list[str]:
    """The findings after the first: one line a phase of a step, with how many more there are of it."""
    groups: dict[tuple[int, str], list[Finding]] = {}
    for finding in result.findings:
        groups.setdefault((finding.step, finding.phase), []).append(finding)
    lines = []
    for group in groups.values():
        others = [finding for finding in group if finding is not result.first]
        if not others:
            continue
        if result.first in group:
            lines.append(f"{plural(len(others), 'more record')} of {group[0].phase} at step {group[0].step}")
        else:
            more = f" (and {len(others) - 1:,} more)" if len(others) > 1 else ""
            lines.append(f"{address(others[0])}: {describe(others[0])}{more}")
    return lines


def reference(result: DiffResult) -> list[str]:
    """What the reference says of each side, the one that does not follow first; empty where it was not asked."""
    if result.reference is None:
        return []
    sides = [("a", result.reference.a), ("b", result.reference.b)]
    return [_reference(letter, side) for letter, side in sorted(sides, key=lambda pair: pair[1].follows)]


def _reference(letter: str, side: ReferenceSide) -> str:
    engine = f"{letter} {side.verdict} the reference ({side.engine}, {side.dtype})"
    found, notes = side.first, "".join(f"; {note}" for note in side.notes)
    if found is None:
        worst = side.worst
        return (
            f"{engine}: {plural(len(side.steps), 'step')}, worst gradient {worst.worst:.2g} at step {worst.step}{notes}"
        )
    micro_batch = "" if found.micro_batch is None else f", micro-batch {found.micro_batch}"
    detail = f"; {found.detail}" if found.detail else ""
    return (
        f"{engine} at step {found.step}, {found.phase}{micro_batch}, {found.name}: "
        f"relative error {short(found.error)} (tolerance {short(found.tolerance)}){detail}{notes}"
    )


def counts(result: DiffResult) -> str:
    """`3 steps, 136 records compared, 78 same bits, 57 within tolerance`."""
    c = result.counts
    parts = [f"{plural(c.steps, 'step')}, {plural(c.compared, 'record')} compared", f"{c.same_bits:,} same bits"]
    others = (
        (c.within, "within tolerance"),
        (c.propagated, "propagated"),
        (c.diverged, "diverged"),
        (c.unrecorded, "unrecorded"),
    )
    return ", ".join([*parts, *(f"{number:,} {word}" for number, word in others if number)])


def tells_counts(result: DiffResult) -> bool:
    """Whether the counts say more than the headline."""
    more = result.counts.propagated or result.counts.unrecorded
    return result.verdict is not Verdict.SAME or bool(more)


def plural(number: int, word: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def short(number: float) -> str:
    """A number in three digits."""
    return f"{number:.3g}"


def value(shown: Shown) -> str:
    """A value in as many digits as float32 has."""
    return f"{shown:.9g}" if isinstance(shown, float) else "none" if shown is None else str(shown)


def one_line(text: str) -> str:
    """Text without line breaks and other control characters: a name from a file may hold any."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
