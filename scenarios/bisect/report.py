"""The result of a bisection as one object, and its three renderings: text, JSON (format 1), markdown.

Exit codes are those of a comparison: 0 same, 1 diverged and the changes that make it are named, 2 no answer, which a bisection
that ran out of its budget is too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from scenarios.bisect.runs import SAME, Counts
from scenarios.bisect.space import Item, Space
from tracer._version import DISTRIBUTION, VERSION

FORMAT: Final = 1
FORMATS: Final = ("text", "json", "markdown")
# Causes that are printed for one set.
FEW: Final = 3


@dataclass(frozen=True, slots=True)
class Named:
    """One minimal set of changes, its first finding and causes, and the changes that it was found on top of."""

    items: tuple[Item, ...]
    first: Mapping[str, Any] | None
    causes: tuple[Mapping[str, Any], ...]
    base: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A choice of changes that gave no answer: a run that failed, an environment that could not be made."""

    keys: tuple[str, ...]
    error: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a bisection found.  `rest` is harmless if it is complete, `candidates` what was being narrowed down if not."""

    verdict: str
    complete: bool
    space: Space
    steps: int
    items: tuple[Item, ...]
    found: tuple[Named, ...]
    rest: tuple[str, ...]
    candidates: tuple[str, ...]
    unresolved: tuple[Unresolved, ...]
    counts: Counts
    environments: int = 0
    spent: str = ""

    @property
    def exit_code(self) -> int:
        """0 same, 1 diverged and all of it named, 2 no answer."""
        if not self.complete:
            return 2
        return 0 if self.verdict == SAME else 1

    def to_json(self) -> str:
        """Format 1: fields are added, never removed."""
        body = {
            "format": FORMAT,
            "tool": {"name": DISTRIBUTION, "version": VERSION},
            "verdict": self.verdict,
            "complete": self.complete,
            "a": {"path": self.space.a.path},
            "b": {"path": self.space.b.path},
            "program": list(self.space.program),
            "steps": self.steps,
            "differing": [_item(item) for item in self.items],
            "found": [_named(named) for named in self.found],
            "harmless": list(self.rest) if self.complete else [],
            "unexamined": [] if self.complete else list(self.rest),
            "candidates": list(self.candidates),
            "unresolved": [{"keys": list(one.keys), "error": one.error} for one in self.unresolved],
            "runs": {
                "recorded": self.counts.recorded,
                "failed": self.counts.failed,
                "cached": self.counts.cached,
                "seconds": round(self.counts.seconds, 1),
                "environments": self.environments,
            },
            "spent": self.spent,
        }
        return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """Answer first, then each set with its first address and causes, then what the search cost."""
        lines = [self.headline()]
        for number, named in enumerate(self.found, start=1):
            for i, item in enumerate(named.items):
                lines.append(f"  {f'{number}.' if i == 0 else '':<4}{change(item)}")
            if named.first is not None:
                lines.append(f"      first  {address(named.first)}")
            lines += [f"      {'cause' if i == 0 else '':<5}  {text}" for i, text in enumerate(told(named))]
        lines += [f"  {line}" for line in self.remarks()]
        return "\n".join(lines) + "\n"

    def to_markdown(self) -> str:
        """The same as a table."""
        lines = [f"**{self.headline()}**", ""]
        if self.found:
            lines += ["| | change | first divergence | cause |", "|---|---|---|---|"]
        for number, named in enumerate(self.found, start=1):
            changes = "<br>".join(f"`{_cell(change(item))}`" for item in named.items)
            first = _cell(address(named.first)) if named.first is not None else ""
            lines.append(f"| {number} | {changes} | {first} | {'<br>'.join(_cell(text) for text in told(named))} |")
        lines += ["", *(f"- {_cell(line)}" for line in self.remarks())]
        return "\n".join(lines) + "\n"

    def headline(self) -> str:
        """The verdict, in one line."""
        total = f"{_count(len(self.items), self._word)} differ{'s' * (len(self.items) == 1)}"
        if not self.items:
            return "SAME: no setting differs, there is nothing to bisect"
        if self.verdict == SAME:
            return f"SAME: {total}, none makes a difference within {_count(self.steps, 'step')}; there is nothing to bisect"
        named = sum(len(found.items) for found in self.found)
        if not self.complete:
            return f"NOT FINISHED: {total}, {named} named so far"
        return f"DIVERGED: {total}, {_count(named, self._word)} make{'s' * (named == 1)} b diverge from a"

    @property
    def _word(self) -> str:
        kinds = {item.kind for item in self.items}
        return kinds.pop() if len(kinds) == 1 else "change"

    def remarks(self) -> list[str]:
        """What else there is to say, a line each."""
        lines = [f"stopped: {self.spent}"] if self.spent else []
        if self.candidates:
            lines.append(f"narrowed down to: {', '.join(self.candidates)}")
        if self.complete and self.found:
            others = f"; the other {len(self.rest)} make no difference" if self.rest else ""
            lines.append(f"with {'it' if self._single else 'these'} a is the same as b{others} ({self._within()})")
        elif not self.complete and self.rest:
            lines.append(f"not examined to the end: {', '.join(self.rest)}")
        for one in self.unresolved[:FEW]:
            lines.append(f"no answer with {', '.join(one.keys)}: {one.error}")
        if len(self.unresolved) > FEW:
            lines.append(f"no answer in {len(self.unresolved) - FEW} more runs")
        lines.append(self.cost())
        return lines

    @property
    def _single(self) -> bool:
        return sum(len(found.items) for found in self.found) == 1

    def _within(self) -> str:
        return f"compared on {_count(self.steps, 'step')}"

    def cost(self) -> str:
        """How many runs it took, and how long they took."""
        parts = [
            f"{_count(self.counts.recorded, 'run')} of {_count(self.steps, 'step')} in {self.counts.seconds:.0f} s"
        ]
        if self.counts.failed:
            parts.append(f"{self.counts.failed} of them failed (tried again the next time)")
        if self.counts.cached:
            parts.append(f"{_count(self.counts.cached, 'run')} known from the cache")
        if self.environments:
            parts.append(f"{_count(self.environments, 'environment')} made")
        return ", ".join(parts)


def render(report: Report, form: str) -> str:
    """The report in a format of FORMATS."""
    return {"text": report.to_text, "json": report.to_json, "markdown": report.to_markdown}[form]()


def change(item: Item) -> str:
    """`lora.layers: 16 -> "all"`, a's value first."""
    if item.kind == "setting":
        return f"{item.key}: {json.dumps(item.a)} → {json.dumps(item.b)}"
    return f"{item.key}: {item.a} → {item.b}"


def address(first: Mapping[str, Any]) -> str:
    """`step 0, init, NAME`."""
    parts = [f"step {first['step']}", str(first["phase"])]
    if first.get("micro_batch") is not None:
        parts.append(f"micro-batch {first['micro_batch']}")
    return ", ".join([*parts, *([str(first["name"])] if first.get("name") else [])])


def _elsewhere(cause: Mapping[str, Any], first: Mapping[str, Any] | None) -> str:
    """The address of a cause that is not about the first finding."""
    where = (cause.get("step"), cause.get("phase"))
    return (
        ""
        if first is None or None in where or where == (first["step"], first["phase"])
        else f"step {where[0]}, {where[1]}: "
    )


def told(named: Named) -> list[str]:
    """Causes in words, a few of them; one line that says so where there is none."""
    texts = [_elsewhere(cause, named.first) + str(cause["summary"]) for cause in named.causes]
    if not texts:
        return ["unexplained"]
    return texts[:FEW] + ([f"and {len(texts) - FEW} more"] if len(texts) > FEW else [])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _item(item: Item) -> dict[str, Any]:
    return {"key": item.key, "kind": item.kind, "a": item.a, "b": item.b}


def _named(named: Named) -> dict[str, Any]:
    return {
        "items": [_item(item) for item in named.items],
        "first": named.first,
        "causes": list(named.causes),
        "on_top_of": list(named.base),
    }
