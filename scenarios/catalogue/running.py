"""Run entries of the catalogue: record their arms, compare them as `trace diff` would, hold that against what is expected.

The result is data (`Report`), rendered by `reports`.  An entry that could not be run is never one that passed: it says what is
missing, or with which error a run ended.
"""

from __future__ import annotations

import enum
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from scenarios.catalogue.check import differences
from scenarios.catalogue.entry import Entry, Expectation
from scenarios.catalogue.recording import Recorded, jobs_of, key_of, record_all

# Called with how much is done, and of how much: runs recorded and entries compared.
Progress = Callable[[int, int], None]


class Status(enum.StrEnum):
    """What became of an entry; the value is the word in a report."""

    EXPECTED = "as expected"
    OTHER = "NOT AS EXPECTED"
    ERROR = "error"
    SKIPPED = "not run"


@dataclass(frozen=True, slots=True)
class Compared:
    """One expectation: the arms, what was expected, what the diff said in one line, and what is otherwise than expected."""

    arms: tuple[str, ...]
    expected: str
    said: str
    wrong: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One entry.  `seconds` are those of its comparisons; recordings are shared."""

    entry: Entry
    status: Status
    compared: tuple[Compared, ...]
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run: outcomes in the order of the entries, number of runs recorded, wall time in seconds."""

    outcomes: tuple[Outcome, ...]
    recorded: int
    seconds: float

    def count(self, status: Status) -> int:
        """Entries with a status."""
        return sum(outcome.status is status for outcome in self.outcomes)

    @property
    def exit_code(self) -> int:
        """0 all as expected, 1 some not, 2 a run failed or nothing could be run."""
        if self.count(Status.ERROR) or self.count(Status.SKIPPED) == len(self.outcomes):
            return 2
        return 1 if self.count(Status.OTHER) else 0


def run_all(entries: Sequence[Entry], folder: Path, *, workers: int, html: bool, progress: Progress) -> Report:
    """Run entries; traces and, with `html`, a report of each pair are left in `folder`."""
    began, runs = time.monotonic(), len(jobs_of(entries))
    total, done = runs + len(entries), 0

    def told() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    progress(0, total)
    recorded = record_all(entries, folder, workers=workers, told=told)
    found: dict[str, Outcome] = {}
    # A fork of a process with threads may hang, and the pool that recorded had threads.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=fresh) as pool:
        futures = [pool.submit(judge, entry, recorded, html) for entry in entries]
        for future in as_completed(futures):
            outcome = future.result()
            found[outcome.entry.id] = outcome
            told()
    return Report(tuple(found[entry.id] for entry in entries), runs, time.monotonic() - began)


def judge(entry: Entry, recorded: Recorded, html: bool) -> Outcome:
    """Compare the arms of one entry."""
    began = time.monotonic()
    absent = {name for check in entry.checks for name in _missing(entry, check, recorded)}
    if absent:
        return Outcome(entry, Status.SKIPPED, (), reason=f"needs {', '.join(sorted(absent))}")
    compared = tuple(_compare(entry, check, recorded, html) for check in entry.checks)
    errors = [one.error for one in compared if one.error]
    status = Status.ERROR if errors else Status.OTHER if any(one.wrong for one in compared) else Status.EXPECTED
    return Outcome(entry, status, compared, time.monotonic() - began, errors[0] if errors else "")


def _missing(entry: Entry, check: Expectation, recorded: Recorded) -> Iterator[str]:
    for arm in check.arms:
        failure = recorded.failures.get(key_of(entry, arm))
        yield from failure.missing if failure is not None else ()


def _compare(entry: Entry, check: Expectation, recorded: Recorded, html: bool) -> Compared:
    keys = [key_of(entry, arm) for arm in check.arms]
    failures = [recorded.failures.get(key) for key in keys]
    if check.error:
        return _failed_as_expected(check, recorded, keys[0])
    for arm, failure in zip(check.arms, failures, strict=True):
        if failure is not None:
            return Compared(check.arms, check.line(), "", error=f"arm {arm}: {failure.error}")
    return _diffed(entry, check, recorded.trace(keys[0]), recorded.trace(keys[1]), recorded.folder if html else None)


def _failed_as_expected(check: Expectation, recorded: Recorded, key: str) -> Compared:
    failure = recorded.failures.get(key)
    said = "recorded" if failure is None else failure.error
    right = failure is not None and failure.slug == check.error
    wrong = () if right else (f"recording: expected the error {check.error}, found {said}",)
    return Compared(check.arms, check.line(), said, wrong)


def _diffed(entry: Entry, check: Expectation, a: Path, b: Path, reports: Path | None) -> Compared:
    from differ import DiffOptions, diff
    from differ.reporters import words
    from tracer.errors import TraceError

    try:
        result = diff(a, b, DiffOptions(series=reports is not None))
        if reports is not None:
            _write_html(reports / f"{entry.id}.{'-'.join(check.arms)}.html", result)
    except TraceError as error:
        return Compared(check.arms, check.line(), "", error=error.line())
    said = result.verdict.value
    if result.first is not None:
        said = words.address(result.first)
    if result.causes:
        said += f": {words.elsewhere(result.causes[0], result.first)}{result.causes[0].summary}"
    return Compared(check.arms, check.line(), said, tuple(differences(check, result, a, b)))


def _write_html(file: Path, result: object) -> None:
    from differ.publish import FILE_WIDTH, write_whole
    from differ.reporters import Style, reporter

    write_whole(file, reporter("html")(result, Style(width=FILE_WIDTH)).encode("utf-8"))  # type: ignore[arg-type]
