"""The report as one HTML file: no network, opens from disk, the verdict and the cause first.

Everything is written by the template, so that it reads and prints without scripts; the script sorts, filters and reads
values out.  Text from a trace is escaped by the template, data for the script by `_island`, and a content security policy
lets no other script run.  Where a table shows a part, it says of how many.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib.resources import files
from typing import Any, Final

from differ.reporters import Style, words
from differ.reporters.html import charts
from differ.result import DiffResult, Shown
from tracer._version import DISTRIBUTION, VERSION
from tracer.errors import BadUsage

try:
    import jinja2
    import markupsafe
except ImportError as error:
    raise BadUsage("the HTML report needs jinja2", f"pip install '{DISTRIBUTION}[html]'") from error

SERIES: Final = True

MOST_FINDINGS: Final = 500
MOST_RECORDS: Final = 500
MOST_LINES: Final = 8


def render(result: DiffResult, style: Style) -> str:  # noqa: ARG001 - the page fits itself to its window
    """The page."""
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template("page.html.j2").render(
        result=result,
        series=result.series,
        words=words,
        charts=charts,
        verdict=result.verdict.value,
        findings=result.findings[:MOST_FINDINGS],
        records=() if result.series is None else result.series.records[:MOST_RECORDS],
        most_lines=MOST_LINES,
        chosen=_chosen(result),
        micro_batches=any(finding.micro_batch is not None for finding in result.findings[:MOST_FINDINGS]),
        style=_raw(_asset("page.css")),
        script=_raw(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        island=_raw(_island(charts.island(result.series))),
        tool=f"{DISTRIBUTION} {VERSION}",
    )  # fmt: skip


def _chosen(result: DiffResult) -> str:
    """The strip of layers that is shown first: that of the first finding's phase if it has one."""
    names = [strip.name for strip in result.series.layers] if result.series is not None else []
    phase = "" if result.first is None else result.first.phase
    return phase if phase in names else next(iter(names), "")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=_plain, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(number=number, name=name, count=count, shown=shown, sortable=sortable)
    return environment


def _plain(value: Any) -> Any:
    """Text of the result without control characters and without marks that turn the direction of writing."""
    return words.one_line(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _raw(text: str) -> markupsafe.Markup:
    """Text of our own, to be put in as it is."""
    return markupsafe.Markup(text)


def _island(data: Any) -> str:
    """JSON that cannot end the script element that holds it, nor begin another."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def name(text: str | None) -> markupsafe.Markup:
    """A name that may break after a dot or a slash; control characters are shown as blanks."""
    escaped = markupsafe.escape(words.one_line(text or ""))
    return _raw(str(escaped).replace(".", ".<wbr>").replace("/", "/<wbr>"))


def number(value: float | None) -> str:
    """A measured number in three digits; empty where there is none."""
    return "" if value is None else words.short(value)


def count(value: int) -> str:
    """`1,234`."""
    return f"{value:,}"


def shown(value: Shown) -> str:
    """One side's value of a finding."""
    return "" if value is None else words.one_line(words.value(value))


def sortable(value: float | None) -> str:
    """A number as the script sorts it; nothing where there is none, and nan above all."""
    if value is None:
        return ""
    if math.isnan(value):
        return "Infinity"
    return repr(float(value)).replace("inf", "Infinity")
