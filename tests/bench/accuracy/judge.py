"""What `trace diff` says of a pair, measured against what was planted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from differ import DiffOptions, DiffResult, diff
from differ.align import Row, Rows
from tests.bench.accuracy.arms import Store, digest_of
from tests.bench.accuracy.fault import Fault
from tracer.names import split_state_name
from tracer.reader import open_trace
from tracer.schema import RNG_PREFIX, Phase


@dataclass(frozen=True)
class Said:
    """The tool on one fault: `found` is where, `cause` the first cause, `share` what it explains."""

    verdict: str
    step: int | None
    phase: str | None
    name: str | None
    place: bool  # step, phase and first name are right
    exact: bool  # and so is the set of parameters
    cause: str
    right: bool
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


class Kept:
    """Answers kept by pair and by the sources that give them."""

    def __init__(self, file: Path, sources: Sequence[str]) -> None:
        self._file, self._made_by = file, digest_of(sources)
        known = json.loads(file.read_text("utf-8")) if file.exists() else {}
        self._known: dict[str, Any] = known.get("answers", {}) if known.get("made_by") == self._made_by else {}

    def has(self, key: str) -> bool:
        """Whether an answer is kept."""
        return key in self._known

    def known(self, key: str) -> Any:
        """A kept answer."""
        return self._known[key]

    def keep(self, key: str, answer: Any) -> Any:
        """Keep an answer, and give it back as it will be read."""
        self._known[key] = json.loads(json.dumps(answer))
        return self._known[key]

    def save(self) -> None:
        """Write all answers."""
        self._file.write_text(json.dumps({"made_by": self._made_by, "answers": self._known}), "utf-8")


def judge(fault: Fault, a: Path, b: Path) -> dict[str, Any]:
    """Compare a fault's pair; a Said as JSON."""
    result = diff(a, b)
    first = result.first
    place = exact = False
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    if first is not None and (first.step, first.phase) == (fault.step, fault.phase):
        expected, found = expected_names(fault, a, b), found_names(result)
        missing, extra = tuple(sorted(expected - found)), tuple(sorted(found - expected))
        place, exact = _parameter(first.phase, first.name) in expected, not missing and not extra
    causes = [cause_word(cause.id, cause.summary) for cause in result.causes]
    right = bool(causes) and any(causes[0].startswith(cause) for cause in fault.causes)
    where = (None, None, None) if first is None else (first.step, first.phase, first.name)
    said = Said(result.verdict.value, *where, place, exact, causes[0] if causes else "", right, missing, extra)
    return asdict(said)


def cause_word(cause: str, summary: str) -> str:
    """A cause by id; a differing setting with the setting's name."""
    return f"{cause} {summary.partition(':')[0]}" if cause == "config.differs" else cause


def found_names(result: DiffResult) -> set[str]:
    """The set of parameters that the report names at its first address: of its causes there, else of its findings."""
    first = result.first
    assert first is not None
    named = {
        name
        for cause in result.causes
        if (cause.step, cause.phase) == (first.step, first.phase)
        for name in cause.names
    }
    found = {f.name for f in result.findings if (f.step, f.phase) == (first.step, first.phase) and f.name}
    return {_parameter(first.phase, name) for name in (named or found)}


def expected_names(fault: Fault, a: Path, b: Path) -> set[str]:
    """The records of the expected row whose bits differ and that the fault's globs match."""
    phase = Phase.parse(fault.phase)
    with open_trace(a) as x, open_trace(b) as y:
        rows, found = (Rows(x), Rows(y)), set()
        numbers = {*x.micro_batches(phase, fault.step), *y.micro_batches(phase, fault.step)}
        for number in numbers:
            pair = [side.get(phase, fault.step, number) for side in rows]
            found |= _differing(*pair)
    names = {_parameter(fault.phase, name) for name in found}
    return {name for name in names if any(fnmatchcase(name, glob) for glob in fault.names)}


def _differing(a: Row | None, b: Row | None) -> set[str]:
    sides = [row for row in (a, b) if row is not None]
    names = {name for row in sides for name in row.positions if not name.startswith(RNG_PREFIX)}
    if len(sides) < 2:
        return names
    x, y = sides
    common = {n for n in names if n in x.positions and n in y.positions}
    same = {n for n in common if x.digest(n) == y.digest(n) and x.state(n) is y.state(n)}
    return names - same


def _parameter(phase: str | None, name: str | None) -> str:
    if name is None:
        return ""
    return split_state_name(name)[0] or name if phase == Phase.OPT_STATE.label else name


def false_alarm(a: Path, b: Path, noise: Sequence[Path] = ()) -> dict[str, Any]:
    """Verdict and margin of a clean pair; where it is not `same`, the first finding."""
    result = diff(a, b, DiffOptions(noise=tuple(noise)))
    first = result.first
    where = None if first is None else [first.step, first.phase, first.name, first.rel_l2, first.tolerance]
    return {"verdict": result.verdict.value, "margin": result.margin, "first": where}


def traces(store: Store, fault: Fault) -> tuple[Path, Path]:
    """Where the two traces of a fault are."""
    return store.trace(fault.a), store.trace(fault.b)
