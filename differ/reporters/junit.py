"""The result as JUnit XML: one test suite, one test case a phase, so that any CI shows which phase diverged.

A phase with findings fails, with the causes that bear on it; one that a side did not record is skipped with that reason;
nothing in common is an error, never an empty suite that passes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final
from xml.etree import ElementTree as ET

from differ.reporters import Style, words
from differ.result import Cause, DiffResult, Finding, Verdict
from tracer.schema import Phase

SERIES: Final = True

# Findings listed in one test case; the rest is counted.
MOST_FINDINGS: Final = 100
LONGEST: Final = 2_000
# XML 1.0 cannot hold these, not even escaped.
_FORBIDDEN: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(result: DiffResult, style: Style) -> str:  # noqa: ARG001 - XML has no width
    """The XML document, with a newline at the end."""
    suite = ET.Element("testsuite", name="trace diff")
    properties = ET.SubElement(suite, "properties")
    for name, text in _properties(result):
        ET.SubElement(properties, "property", name=name, value=_xml(text))
    group = f"trace.{result.a.label}-{result.b.label}"
    cases = [*_phase_cases(result), *_whole_cases(result)]
    for name, outcome in cases:
        case = ET.SubElement(suite, "testcase", classname=_xml(group), name=_xml(name), time="0")
        if outcome is not None:
            case.append(outcome)
    tags = [outcome.tag for _, outcome in cases if outcome is not None]
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(tags.count(tag)))
    suite.set("tests", str(len(cases)))
    said = [words.headline(result), words.counts(result), *words.left_out(result)]
    ET.SubElement(suite, "system-out").text = _xml("\n".join(said))
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


Case = tuple[str, "ET.Element | None"]


def _properties(result: DiffResult) -> list[tuple[str, str]]:
    sides = [(f"{letter}.{key}", str(getattr(side, key))) for letter, side in (("a", result.a), ("b", result.b))
             for key in ("path", "label", "tool")]  # fmt: skip
    return [("verdict", result.verdict.value), ("first", words.address(result.first)), *sides]


def _phase_cases(result: DiffResult) -> list[Case]:
    """A case for each phase, in causal order; one of which nothing was judged is skipped, it did not pass."""
    found: dict[str, list[Finding]] = {}
    for finding in result.findings:
        found.setdefault(finding.phase, []).append(finding)
    skipped = {note.phase: note for note in result.notes if note.id == "phase.unrecorded" and note.phase}
    totals = result.series.totals if result.series is not None else ()
    for total in totals:
        if total.propagated and not total.compared:
            unjudged = f"not judged: {words.plural(total.propagated, 'record')} differ because their inputs do"
            skipped[total.phase] = Cause("propagated", unjudged, phase=total.phase)
    counted = [total.phase for total in totals if total.compared]
    cases: list[Case] = []
    for phase in sorted({*counted, *found, *skipped}, key=Phase.parse):
        if phase in found:
            cases.append((phase, _failure(result, found[phase])))
        elif phase in skipped and phase not in counted:
            cases.append((phase, ET.Element("skipped", message=_xml(skipped[phase].summary))))
        else:
            cases.append((phase, None))
    return cases


def _whole_cases(result: DiffResult) -> list[Case]:
    if result.verdict is not Verdict.INCOMPARABLE:
        return [] if result.findings or result.series is not None else [("diff", None)]
    error = ET.Element("error", type="incomparable", message="the traces have nothing in common: nothing was compared")
    error.text = _xml("\n".join(note.summary for note in result.notes))
    return [("comparison", error)]


def _failure(result: DiffResult, findings: Sequence[Finding]) -> ET.Element:
    first = findings[0]
    causes = [cause for cause in words.causes(result) if cause.phase == first.phase]
    title = words.explained(causes[0], first) if causes else words.describe(first)
    message = f"{words.address(first)}: {title}"
    failure = ET.Element("failure", type=first.kind.value, message=_xml(message))
    failure.text = _xml("\n".join(_details(causes, findings)))
    return failure


def _details(causes: Sequence[Cause], findings: Sequence[Finding]) -> list[str]:
    lines = [f"cause: {words.explained(cause, findings[0])}" for cause in causes]
    lines += [f"{words.address(finding)}: {words.describe(finding)}" for finding in findings[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        lines.append(f"the first {MOST_FINDINGS} of {len(findings):,} findings are shown")
    return [words.one_line(line)[:LONGEST] for line in lines]


def _xml(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
