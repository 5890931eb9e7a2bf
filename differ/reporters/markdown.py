"""The report as GitHub-flavoured markdown, for a job summary or a comment; below `MOST_BYTES`, whatever the result holds.

Names come from files and are data: they are quoted as code, other text is escaped, so that nothing in a trace can become
markup.  What is left out is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from differ.reporters import Style, words
from differ.result import DiffResult, Finding, Verdict
from differ.series import PhaseTotal

SERIES: Final = True

# A job summary may hold 1 MiB a step, and other tools write to it too.
MOST_BYTES: Final = 900_000
MOST_FINDINGS: Final = 200
MOST_CAUSES: Final = 50
# A name or a sentence longer than this is cut with an ellipsis.
LONGEST: Final = 400
# Kept back for the lines that say what was left out, and for the tags around the table.
_RESERVE: Final = 2_000

_SIGNS: Final = {Verdict.SAME: "✅", Verdict.DIVERGED: "❌", Verdict.INCOMPARABLE: "⚠️"}
# What GitHub's markdown reads as markup; a colon only where an emoji or a link could begin, `_` only around words.
_MARKUP: Final = re.compile(r"([\\`*\[\]<>#|~@&$]|:(?=[\w/+-])|(?<!\w)_|_(?!\w))")


def render(result: DiffResult, style: Style) -> str:  # noqa: ARG001 - markdown has no width
    """The report as markdown, with a newline at the end."""
    lines = [*_head(result), *_why(result), *_phases(result)]
    used = sum(len(line.encode()) + 1 for line in lines)
    lines += _findings(result.findings, MOST_BYTES - _RESERVE - used)
    return "\n".join(lines) + "\n"


def _head(result: DiffResult) -> Iterator[str]:
    verdict, _, rest = words.headline(result).partition(" ")
    if result.verdict is Verdict.DIVERGED and (first := result.first) is not None:
        where = f"at step {first.step}, {text(first.phase)}"
        if first.micro_batch is not None:
            where += f", micro-batch {first.micro_batch}"
        name = "" if first.name is None else f", {code(first.name)}"
        yield f"## {_SIGNS[result.verdict]} {verdict} {where}{name}"
    else:
        yield f"## {_SIGNS[result.verdict]} {verdict}"
        yield ""
        yield f"{text(rest.strip())}."
    yield ""
    yield "| | trace | path | tool | steps |"
    yield "|---|---|---|---|---|"
    for letter, side in (("a", result.a), ("b", result.b)):
        steps = f"{side.steps:,}" if side.finished else f"{side.steps:,}, unfinished"
        yield f"| **{letter}** | {code(side.path)} | {code(side.label)} | {text(side.tool)} | {steps} |"
    yield ""


def _why(result: DiffResult) -> Iterator[str]:
    found = [describe(result.first)] if result.first is not None else []
    if result.first is not None and result.first.nearest:
        found.append(text(words.nearest(result.first)))
    agreed = words.before(result)
    yield from _listed("Cause", [text(words.explained(cause, result.first)) for cause in words.causes(result)])
    yield from _listed("Found", found)
    yield from _listed("Reference", [text(line) for line in words.reference(result)])
    yield from _listed("Before", [text(agreed)] if agreed else [])
    yield from _listed("Also independent", [text(line) for line in words.also(result)])
    yield from _listed("Settings that differ", [text(cause.summary) for cause in words.settings(result)])
    yield from _listed("Notes", [text(cause.summary) for cause in words.notes(result)])
    if words.tells_counts(result):
        yield f"{text(words.counts(result))}."
        yield ""


def _listed(title: str, items: Sequence[str]) -> Iterator[str]:
    if not items:
        return
    if len(items) == 1:
        yield f"**{title}:** {items[0]}"
    else:
        yield f"**{title}**"
        yield ""
        yield from (f"- {item}" for item in items[:MOST_CAUSES])
        if len(items) > MOST_CAUSES:
            yield f"- … the first {MOST_CAUSES} of {len(items):,} are shown"
    yield ""


def _phases(result: DiffResult) -> Iterator[str]:
    if result.series is None or not result.series.totals:
        return
    yield "| phase | compared | same bits | within | propagated | diverged | worst of tolerance |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    yield from (_phase(total) for total in result.series.totals)
    yield ""


def _phase(total: PhaseTotal) -> str:
    numbers = [total.compared, total.same_bits, total.within, total.propagated, total.diverged]
    cells = [f"{number:,}" if number else "·" for number in numbers]
    if total.diverged:
        cells[-1] = f"**{cells[-1]}**"
    margin = "·" if total.margin is None else words.short(total.margin)
    return f"| {text(total.phase)} | {' | '.join(cells)} | {margin} |"


def _findings(findings: Sequence[Finding], budget: int) -> Iterator[str]:
    """The table, as many rows as fit."""
    if not findings:
        return
    rows = list(_fitting((_row(finding) for finding in findings[:MOST_FINDINGS]), budget))
    part = len(rows) < len(findings)
    shown = (
        f"first {len(rows):,} of {words.plural(len(findings), 'finding')}"
        if part
        else words.plural(len(rows), "finding")
    )
    yield f"<details><summary>{shown}</summary>"
    yield ""
    yield "| step | phase | micro-batch | name | kind | what |"
    yield "|--:|---|--:|---|---|---|"
    yield from rows
    yield ""
    yield "</details>"


def _row(finding: Finding) -> str:
    micro_batch = "" if finding.micro_batch is None else str(finding.micro_batch)
    name = "" if finding.name is None else code(finding.name)
    kind = text(finding.kind.value)
    return f"| {finding.step} | {text(finding.phase)} | {micro_batch} | {name} | {kind} | {describe(finding)} |"


def _fitting(rows: Iterable[str], budget: int) -> Iterator[str]:
    for row in rows:
        budget -= len(row.encode()) + 1
        if budget < 0:
            return
        yield row


def describe(finding: Finding) -> str:
    """A finding in words, escaped."""
    return text(words.describe(finding))


def text(plain: str) -> str:
    """Plain text that stays plain text in markdown, in a table too."""
    return _MARKUP.sub(r"\\\1", _cut(words.one_line(plain)))


def code(name: str) -> str:
    """A name as code: fenced by more backticks than it holds, `|` escaped for tables."""
    name = _cut(words.one_line(name))
    longest = max((len(run) for run in re.findall("`+", name)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{name.replace('|', chr(92) + '|') or ' '}{pad}{fence}"


def _cut(plain: str) -> str:
    return plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…"
