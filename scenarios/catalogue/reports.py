"""Render the run of a catalogue: text, JSON, markdown, JUnit XML.  Nothing here computes or opens anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final
from xml.etree import ElementTree as ET

from scenarios.catalogue.running import Compared, Outcome, Report, Status

FORMAT: Final = 1
_MARK: Final = {Status.EXPECTED: "ok", Status.OTHER: "WRONG", Status.ERROR: "ERROR", Status.SKIPPED: "-"}
# XML 1.0 cannot hold these, not even escaped.
_FORBIDDEN: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(report: Report) -> str:
    """One line an entry, what is otherwise than expected below it, and the counts."""
    width = max((len(outcome.entry.id) for outcome in report.outcomes), default=0)
    lines = []
    for outcome in report.outcomes:
        lines.append(f"{_MARK[outcome.status]:<6}{outcome.entry.id:<{width}}  {_said(outcome)}")
        lines += [f"      {line}" for line in _problems(outcome)]
    return "\n".join([*lines, summary(report)]) + "\n"


def summary(report: Report) -> str:
    """`43 scenarios: 43 as expected; 71 runs recorded, 212 s`."""
    counts = ", ".join(f"{n} {status.value}" for status in Status if (n := report.count(status)))
    head = f"{_count(len(report.outcomes), 'scenario')}: {counts}"
    return f"{head}; {_count(report.recorded, 'run')} recorded, {report.seconds:.0f} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _said(outcome: Outcome) -> str:
    if outcome.status is Status.SKIPPED:
        return outcome.reason
    return outcome.compared[0].said or outcome.reason


def _problems(outcome: Outcome) -> Iterator[str]:
    for one in outcome.compared:
        pair = " and ".join(one.arms)
        yield from (f"{pair}: {wrong}" for wrong in one.wrong)
        if one.error:
            yield f"{pair}: {one.error}"


def as_json(report: Report) -> str:
    """Everything, keys sorted."""
    body = {
        "format": FORMAT,
        "seconds": round(report.seconds, 1),
        "runs": report.recorded,
        "counts": {status.name.lower(): report.count(status) for status in Status},
        "scenarios": [_plain(outcome) for outcome in report.outcomes],
    }
    return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _plain(outcome: Outcome) -> dict[str, object]:
    entry = outcome.entry
    return {
        "id": entry.id,
        "title": entry.title,
        "rows": entry.rows,
        "source": entry.source,
        "emulated": entry.emulated,
        "status": outcome.status.name.lower(),
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 2),
        "compared": [{name: getattr(one, name) for name in Compared.__slots__} for one in outcome.compared],
    }


def markdown(report: Report) -> str:
    """A table."""
    lines = ["| scenario | finding | expected | said | |", "|---|---|---|---|---|"]
    for outcome in report.outcomes:
        first = outcome.compared[0] if outcome.compared else None
        cells = (
            f"`{outcome.entry.id}`", outcome.entry.title, first.expected if first else "", _said(outcome),
            outcome.status.value,
        )  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    problems = [f"* `{outcome.entry.id}`: {line}" for outcome in report.outcomes for line in _problems(outcome)]
    return "\n".join([*lines, "", *problems, *([""] if problems else []), summary(report)]) + "\n"


def junit(report: Report) -> str:
    """One test suite, one test case an entry."""
    suite = ET.Element("testsuite", name="trace scenarios", time=f"{report.seconds:.1f}")
    for outcome in report.outcomes:
        case = ET.SubElement(
            suite, "testcase", classname="trace.scenarios", name=outcome.entry.id, time=f"{outcome.seconds:.2f}"
        )
        problems = _clean("\n".join(_problems(outcome)))
        if outcome.status is Status.SKIPPED:
            ET.SubElement(case, "skipped", message=_clean(outcome.reason))
        elif outcome.status is not Status.EXPECTED:
            tag = "failure" if outcome.status is Status.OTHER else "error"
            ET.SubElement(case, tag, message=problems.partition("\n")[0]).text = problems
    counts = {"failures": Status.OTHER, "errors": Status.ERROR, "skipped": Status.SKIPPED}
    for attribute, status in counts.items():
        suite.set(attribute, str(report.count(status)))
    suite.set("tests", str(len(report.outcomes)))
    ET.SubElement(suite, "system-out").text = summary(report)
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _clean(words: str) -> str:
    return _FORBIDDEN.sub("\ufffd", words)


FORMATS: Final[Mapping[str, Callable[[Report], str]]] = {
    "text": text,
    "json": as_json,
    "markdown": markdown,
    "junit": junit,
}
