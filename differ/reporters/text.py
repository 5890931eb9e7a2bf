"""The report for a terminal: the verdict first, then why, what agrees before, what else is independent, what to know.

    DIVERGED at step 1, clipped_grad, model.layers.4.mlp.down_proj.lora_B.weight           a: mlx-lm   b: hf-trainer
      cause    b adapts layers 2–17, a all 18
      ...

Renders a `DiffResult` and computes nothing but line breaks.  At most about 25 lines: what is left out is counted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from differ.reporters import Style
from differ.result import Cause, DiffResult, Finding, Kind, Shown, Verdict

INDENT: Final = 2
LABEL: Final = 9
# How many of each a report shows; the rest is counted.
MOST_ALSO: Final = 5
MOST_SETTINGS: Final = 4
MOST_NOTES: Final = 4

_CONFIG = "config.differs"


def render(result: DiffResult, style: Style) -> str:
    """The report as text, with a newline at the end."""
    lines = [*_head(result, style.width), *_body(result, style.width)]
    if style.colour:
        lines[0] = _coloured(lines[0], result.verdict)
    return "\n".join(lines) + "\n"


def _coloured(line: str, verdict: Verdict) -> str:
    """The verdict's word in colour.  Rich is imported here, so that a pipe never pays for it."""
    import io

    from rich.console import Console
    from rich.text import Text

    word, space, rest = line.partition(" ")
    colour = {Verdict.SAME: "bold green", Verdict.DIVERGED: "bold red", Verdict.INCOMPARABLE: "bold yellow"}[verdict]
    text = Text(word, style=colour) + Text(space + rest)
    console = Console(file=io.StringIO(), force_terminal=True, width=max(len(line), 1), highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(text, end="")
    return capture.get()


def _head(result: DiffResult, width: int) -> list[str]:
    """First line; the names of the sides go to its right end if there is room, else to a line of their own."""
    line = {
        Verdict.SAME: _same(result),
        Verdict.DIVERGED: f"DIVERGED at {address(result.first)}",
        Verdict.INCOMPARABLE: "INCOMPARABLE  nothing was compared",
    }[result.verdict]
    sides = f"a: {result.a.label}   b: {result.b.label}"
    if len(line) + 3 + len(sides) <= width:
        return [line + " " * (width - len(line) - len(sides)) + sides]
    return [*textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False), *_line("runs", sides, width)]


def _same(result: DiffResult) -> str:
    counts = result.counts
    text = f"SAME  {_n(counts.steps, 'step')}, {_n(counts.compared, 'record')} compared, {counts.same_bits:,} same bits"
    if result.worst is not None and counts.within:
        text += f"; worst {_short(result.worst.margin)} of tolerance at step {result.worst.step} {result.worst.phase}"
    return text


def address(finding: Finding | None) -> str:
    """`step 1, batch, micro-batch 0, input_ids`."""
    if finding is None:
        return "no step"
    micro_batch = "" if finding.micro_batch is None else f", micro-batch {finding.micro_batch}"
    name = "" if finding.name is None else f", {finding.name}"
    return f"step {finding.step}, {finding.phase}{micro_batch}{name}"


def _body(result: DiffResult, width: int) -> Iterator[str]:
    settings = [cause for cause in (*result.causes, *result.notes) if cause.id == _CONFIG]
    for cause in result.causes:
        if cause.id != _CONFIG:
            yield from _line("cause", _explained(cause), width)
    if result.first is not None:
        yield from _line("found", describe(result.first), width)
        for line in _nearest(result.first):
            yield from _line("", line, width)
    if result.verdict is Verdict.SAME and result.worst is not None and result.counts.within:
        yield from _line("worst", result.worst.name, width)
    yield from _before(result, width)
    yield from _also(result, width)
    yield from _some("config", [cause.summary for cause in settings], MOST_SETTINGS, "settings", width)
    notes = [cause.summary for cause in result.notes if cause.id not in (_CONFIG, "rule", "repeated")]
    yield from _some("note", notes, MOST_NOTES, "notes", width)
    if result.verdict is not Verdict.SAME or result.counts.propagated or result.counts.unrecorded:
        yield from _line("counts", _counts(result), width)


def _explained(cause: Cause) -> str:
    share = "" if cause.explains is None else f" (explains {100 * cause.explains:.1f} % of the difference)"
    return cause.summary + share


def describe(finding: Finding) -> str:
    """A finding in words, without its address."""
    if finding.kind in (Kind.MISSING_A, Kind.MISSING_B):
        side = "a" if finding.kind is Kind.MISSING_A else "b"
        return finding.detail or f"missing in {side}"
    if finding.kind in (Kind.SHAPE, Kind.STATE):
        text = f"{finding.kind}: a {_value(finding.a)}, b {_value(finding.b)}"
        return f"{text}; {finding.detail}" if finding.detail else text
    parts = [finding.detail] if finding.detail else []
    if finding.kind is Kind.NONFINITE:
        parts.append("nan or inf on one side only")
    elif finding.rel_l2 is not None and finding.tolerance is not None:
        parts.append(f"relative error {_short(finding.rel_l2)} (tolerance {_short(finding.tolerance)})")
    if finding.index is not None:
        at = f" at {list(finding.index)}" if finding.index else ""
        parts.append(f"a {_value(finding.a)}, b {_value(finding.b)}{at}")
    return "; ".join(parts)


def _nearest(finding: Finding) -> list[str]:
    if not finding.nearest:
        return []
    side = "a" if finding.kind is Kind.MISSING_A else "b"
    return [f"nearest in {side}: " + ", ".join(finding.nearest)]


def _before(result: DiffResult, width: int) -> Iterator[str]:
    before = result.before
    if before is None or not before.records:
        return
    steps = [f"{_n(before.steps, 'whole step')}"] if before.steps else []
    what = ", ".join([*steps, *before.phases]) or "step 0"
    verb = "agrees" if what.count(",") == 0 and not before.steps else "agree"
    seen = f"({_n(before.records, 'record')}, worst {_short(before.margin)} of tolerance)"
    yield from _line("before", f"{what} {verb} {seen}", width)


def _also(result: DiffResult, width: int) -> Iterator[str]:
    """The other findings: one line a phase of a step, with how many more there are of it."""
    groups: dict[tuple[int, str], list[Finding]] = {}
    for finding in result.findings:
        groups.setdefault((finding.step, finding.phase), []).append(finding)
    lines = []
    for (_, _), group in groups.items():
        others = [finding for finding in group if finding is not result.first]
        if not others:
            continue
        if result.first in group:
            lines.append(f"{_n(len(others), 'more record')} of {group[0].phase} at step {group[0].step}")
        else:
            more = f" (and {len(others) - 1:,} more)" if len(others) > 1 else ""
            lines.append(f"{address(others[0])}: {describe(others[0])}{more}")
    yield from _some("also", lines, MOST_ALSO, "findings", width)


def _counts(result: DiffResult) -> str:
    counts = result.counts
    parts = [f"{_n(counts.steps, 'step')}, {_n(counts.compared, 'record')} compared", f"{counts.same_bits:,} same bits"]
    for number, word in (
        (counts.within, "within tolerance"),
        (counts.propagated, "propagated"),
        (counts.diverged, "diverged"),
        (counts.unrecorded, "unrecorded"),
    ):
        if number:
            parts.append(f"{number:,} {word}")
    return ", ".join(parts)


def _some(label: str, lines: Sequence[str], most: int, what: str, width: int) -> Iterator[str]:
    for line in lines[:most]:
        yield from _line(label, line, width)
    if len(lines) > most:
        yield from _line(label, f"… {len(lines) - most:,} more {what}", width)


def _line(label: str, text: str, width: int) -> list[str]:
    """`  label    text`, wrapped under its own beginning; names are never broken."""
    head = " " * INDENT + label.ljust(LABEL)
    return textwrap.wrap(
        text, max(width, 40), initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _n(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _short(number: float) -> str:
    return f"{number:.3g}"


def _value(value: Shown) -> str:
    return f"{value:.9g}" if isinstance(value, float) else "none" if value is None else str(value)
