"""Hold what `trace diff` says of a pair against what an entry expects; pure functions of results.

Every difference is one sentence, *expected …, found …*; an empty list means as expected.  Nothing is taken for granted: the
name of each record at the first address, the cause that comes first and its numbers are all compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from differ import DiffResult
from differ.align import Row, Rows
from scenarios.catalogue.entry import NO_CAUSE, CauseSpec, Expectation
from tracer.names import split_state_name
from tracer.reader import open_trace
from tracer.schema import RNG_PREFIX, Phase

Names = frozenset[str]


def differences(expected: Expectation, result: DiffResult, a: Path, b: Path) -> list[str]:
    """What is otherwise than expected; `a` and `b` are the traces that the result is of."""
    return list(_differences(expected, result, a, b))


def _differences(expected: Expectation, result: DiffResult, a: Path, b: Path) -> Iterator[str]:
    if result.verdict.value != expected.verdict:
        yield _sentence("verdict", expected.verdict, f"{result.verdict.value}{_where(result)}")
        return
    if expected.verdict == "same" and not result.counts.compared:
        yield _sentence("records compared", "some", 0)
    if expected.bits and result.counts.same_bits != result.counts.compared:
        yield _sentence("same to the bit", result.counts.compared, result.counts.same_bits)
    for note in expected.notes:
        if note not in (found := sorted({n.id for n in result.notes})):
            yield _sentence("note", note, ", ".join(found) or "none")
    if result.first is not None and expected.verdict == "diverged":
        yield from _address(expected, result, a, b)
        yield from _causes(expected, result)


def _where(result: DiffResult) -> str:
    first = result.first
    return "" if first is None else f" at step {first.step}, {first.phase}, {first.name}"


def _address(expected: Expectation, result: DiffResult, a: Path, b: Path) -> Iterator[str]:
    first = result.first
    assert first is not None
    found = (first.step, first.phase)
    if found != (expected.step, expected.phase):
        yield _sentence("first", f"step {expected.step}, {expected.phase}", _where(result)[4:])
        return
    if expected.kind is not None and first.kind.value != expected.kind:
        yield _sentence("kind", expected.kind, first.kind.value)
    yield from _names(expected, result, rows_at(a, b, first.phase, first.step))


def _names(expected: Expectation, result: DiffResult, rows: tuple[Names, Names]) -> Iterator[str]:
    """The set rule.  `rows`: all names at the address, and those whose bits differ or that are on one side only."""
    said = reported(result)
    everything, differing = rows
    wrong = sorted(name for name in said if not _matches(name, expected.names))
    if wrong:
        yield _sentence("names", ", ".join(expected.names), f"also {_few(wrong)}")
    wanted = {"all": everything, "differing": differing, "some": frozenset[str]()}[expected.rule]
    left_out = sorted(name for name in wanted if _matches(name, expected.names) and name not in said)
    if left_out:
        yield _sentence(f"{expected.rule} of {', '.join(expected.names)}", "reported", f"not {_few(left_out)}")
    if not said:
        yield _sentence("names", ", ".join(expected.names), "none")


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def reported(result: DiffResult) -> Names:
    """The records that a report names at the first address: those of the causes there, else those of the findings."""
    first = result.first
    assert first is not None
    at = (first.step, first.phase)
    found = {f.name or "" for f in result.findings if (f.step, f.phase) == at}
    named = {name for cause in result.causes if (cause.step, cause.phase) == at for name in cause.names}
    return frozenset(_record(first.phase, name) for name in found | named)


def rows_at(a: Path, b: Path, phase: str, step: int) -> tuple[Names, Names]:
    """Names in the rows of a phase at a step, over all micro-batches and both sides; and those that differ."""
    where = Phase.parse(phase)
    everything: set[str] = set()
    differing: set[str] = set()
    with open_trace(a) as x, open_trace(b) as y:
        sides = Rows(x), Rows(y)
        for number in {*x.micro_batches(where, step), *y.micro_batches(where, step)}:
            pair = [side.get(where, step, number) for side in sides]
            names = {name for row in pair if row is not None for name in row.positions}
            names = {name for name in names if not name.startswith(RNG_PREFIX)}
            everything |= names
            differing |= names - _equal(*pair)
    plain = [frozenset(_record(phase, name) for name in names) for names in (everything, differing)]
    return plain[0], plain[1]


def _equal(a: Row | None, b: Row | None) -> set[str]:
    if a is None or b is None:
        return set()
    common = (name for name in a.positions if name in b.positions)
    return {name for name in common if a.digest(name) == b.digest(name) and a.state(name) is b.state(name)}


def _record(phase: str, name: str) -> str:
    """A record's parameter; in `opt_state` several records belong to one."""
    return split_state_name(name)[0] or name if phase == Phase.OPT_STATE.label else name


def _causes(expected: Expectation, result: DiffResult) -> Iterator[str]:
    if expected.first is not None and expected.first.id == NO_CAUSE:
        first = result.first
        assert first is not None
        here = [c.id for c in result.causes if (c.step, c.phase) == (first.step, first.phase)]
        if here:
            yield _sentence("cause", "none", ", ".join(here))
    elif expected.first is not None:
        yield from _cause("first cause", expected.first, list(result.causes[:1]), result)
    for cause in expected.also:
        yield from _cause("cause", cause, [c for c in result.causes if c.id == cause.id], result)


def _cause(what: str, spec: CauseSpec, candidates: Sequence[Any], result: DiffResult) -> Iterator[str]:
    """The best candidate's differences; none of that id is one."""
    mine = [cause for cause in candidates if cause.id == spec.id]
    if not mine:
        yield _sentence(what, spec.id, ", ".join(cause.id for cause in result.causes) or "none")
        return
    yield from min(([*_unlike(spec, cause)] for cause in mine), key=len)


def _unlike(spec: CauseSpec, cause: Any) -> Iterator[str]:
    for key in ("step", "phase", "side"):
        wanted = getattr(spec, key)
        if wanted is not None and getattr(cause, key) != wanted:
            yield _sentence(f"{spec.id}: {key}", wanted, getattr(cause, key))
    found: Mapping[str, Any] = cause.parameters or {}
    for key, wanted in (spec.parameters or {}).items():
        if key not in found or not close(wanted, found[key], spec.tolerance):
            yield _sentence(f"{spec.id}: {key}", wanted, found.get(key, "not there"))


def close(wanted: Any, found: Any, tolerance: float) -> bool:
    """Numbers to a relative tolerance, lists item by item, tables by the keys that are wanted, anything else exactly."""
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    if isinstance(wanted, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(wanted, found, rel_tol=tolerance, abs_tol=0.0)
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)):
        return len(wanted) == len(found) and all(close(w, f, tolerance) for w, f in zip(wanted, found, strict=True))
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return all(key in found and close(value, found[key], tolerance) for key, value in wanted.items())
    return bool(wanted == found)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _sentence(what: str, expected: object, found: object) -> str:
    return f"{what}: expected {expected}, found {found}"
