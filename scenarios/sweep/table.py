"""The paired table of a sweep: per cell the pass rate with its interval and where its runs diverge first.

One object from results in any order; its renderings are the same whoever ran the tasks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from scenarios.sweep.plan import Plan
from scenarios.sweep.wilson import wilson
from scenarios.sweep.work import Result
from tracer._version import DISTRIBUTION, VERSION

FORMAT: Final = 1
FORMATS: Final = ("text", "json", "markdown")


@dataclass(frozen=True, slots=True)
class Line:
    """One cell (on one path, where each is judged by itself): passed of judged, and how many gave no answer."""

    cell: int
    column: str
    title: str
    passed: int
    judged: int
    unanswered: int
    interval: tuple[float, float]
    first: str
    cause: str
    error: str


@dataclass(frozen=True, slots=True)
class Table:
    """A finished sweep."""

    plan: Plan
    lines: tuple[Line, ...]
    results: tuple[Result, ...]

    @property
    def passed(self) -> int:
        """Tasks that passed."""
        return sum(line.passed for line in self.lines)

    @property
    def unanswered(self) -> int:
        """Tasks without an answer."""
        return sum(line.unanswered for line in self.lines)

    @property
    def exit_code(self) -> int:
        """0 everything passed, 1 something did not, 2 something gave no answer."""
        if self.unanswered:
            return 2
        return 0 if self.passed == len(self.results) else 1

    def headline(self) -> str:
        """The verdict, in one line."""
        total = len(self.results)
        words = ("SAME", "DIVERGED") if self.plan.rule.compares else ("PASSED", "NOT PASSED")
        word = words[self.passed != total - self.unanswered] if self.unanswered < total else "NO ANSWER"
        lost = f", {self.unanswered} gave no answer" if self.unanswered else ""
        verb = "are" if self.plan.rule.compares else "have"
        return f"{word}: {self.passed} of {total} runs {verb} {self.plan.against()}{lost}"

    def to_text(self) -> str:
        """The verdict and the table in columns."""
        rows = [self._head(), *(self._row(line) for line in self.lines)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.headline(), *(f"  {line}" for line in lines), *self._remarks()]) + "\n"

    def to_markdown(self) -> str:
        """The same for a page."""
        head = self._head()
        rows = ["| " + " | ".join(text.replace("|", "\\|") for text in self._row(line)) + " |" for line in self.lines]
        lines = [f"**{self.headline()}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]
        return "\n".join([*lines, *(f"\n{text.strip()}" for text in self._remarks())]) + "\n"

    def to_json(self) -> str:
        """Format 1: fields are added, never removed.  Times are not in it: it is equal wherever the tasks ran."""
        results = [{k: v for k, v in asdict(r).items() if k not in ("seconds", "runs")} for r in self.results]
        body = {
            "format": FORMAT,
            "tool": {"name": DISTRIBUTION, "version": VERSION},
            "paths": list(self.plan.paths),
            "pass": str(self.plan.rule),
            "against": self.plan.against(),
            "seeds": list(self.plan.seeds),
            "cells": [dict(cell) for cell in self.plan.cells],
            "lines": [asdict(line) for line in self.lines],
            "results": [_finite(result) for result in results],
        }
        return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    def _head(self) -> list[str]:
        path = ["path"] if len(self.plan.columns) > 1 else []
        word = "same" if self.plan.rule.compares else "passed"
        last = ["first divergence", "cause"] if self.plan.rule.compares else []
        return ["cell", *path, word, "rate", "95 % interval", *last]

    def _row(self, line: Line) -> list[str]:
        path = [line.column] if len(self.plan.columns) > 1 else []
        rate = percent(line.passed, line.judged)
        low, high = line.interval
        interval = f"{low * 100:.0f} to {high * 100:.0f} %" if line.judged else ""
        last = [line.first, line.cause] if self.plan.rule.compares else []
        return [line.title, *path, f"{line.passed} of {line.judged}", rate, interval, *last]

    def _remarks(self) -> list[str]:
        return [
            f"  {line.unanswered} of {line.title}{f' on {line.column}' * bool(line.column)} gave no answer: {line.error}"
            for line in self.lines
            if line.unanswered
        ]


def make_table(plan: Plan, results: Iterable[Result]) -> Table:
    """The table of all results, in the plan's order."""
    ordered = sorted(results, key=lambda r: (r.cell, plan.columns.index(r.column), plan.seeds.index(r.seed)))
    places = [(cell, column) for cell in range(len(plan.cells)) for column in plan.columns]
    lines = tuple(_line(plan, cell, column, ordered) for cell, column in places)
    return Table(plan, lines, tuple(ordered))


def _line(plan: Plan, cell: int, column: str, results: Iterable[Result]) -> Line:
    own = [result for result in results if (result.cell, result.column) == (cell, column)]
    judged = [result for result in own if result.passed is not None]
    passed = sum(result.passed is True for result in judged)
    failed = [result for result in judged if not result.passed]
    return Line(
        cell,
        column,
        plan.title(cell),
        passed,
        len(judged),
        len(own) - len(judged),
        wilson(passed, len(judged)),
        _commonest([_address(result.first) for result in failed if result.first is not None]),
        _commonest([result.cause for result in failed if result.cause]),
        next((result.error for result in own if result.passed is None), ""),
    )


def _address(first: Mapping[str, Any]) -> str:
    return f"step {first['step']}, {first['phase']}" + (f", {first['name']}" if first.get("name") else "")


def _commonest(texts: list[str]) -> str:
    """The most frequent text, the first one in the alphabet of several; with its count unless it is the only one."""
    if not texts:
        return ""
    text, count = min(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    return text if count == len(texts) else f"{text} ({count} of {len(texts)})"


def percent(passed: int, judged: int) -> str:
    """A rate; never `100 %` or `0 %` for one that only rounds to it."""
    if not judged:
        return ""
    rate = 100 * passed / judged
    if 0 < passed < judged:
        rate = min(max(rate, 1.0), 99.0)
    return f"{rate:.0f} %"


def _finite(value: Any) -> Any:
    """Numbers that JSON cannot hold as words."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def render(table: Table, form: str) -> str:
    """The table in a format of FORMATS."""
    return {"text": table.to_text, "json": table.to_json, "markdown": table.to_markdown}[form]()
