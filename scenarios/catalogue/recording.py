"""Record the arms of the entries asked for, each different run once, into one folder.

A run is known by its content (`entry.identity`), so entries that have an arm in common share its trace.  Arms that take
adapters or batches from another are recorded after it.  Importing a framework takes longer than training a tiny model, so one
process records several arms, but never of two paths: a training library may change its framework for the whole process.  Programs
that change nothing in theirs are recorded beside the arms of a path (`programs.beside`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scenarios.catalogue import programs
from scenarios.catalogue.entry import Entry, identity
from scenarios.catalogue.processes import Host, Schedule, Task
from scenarios.paths import path_info

Told = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One run to record: what makes it, and the keys of the runs that it takes something from."""

    key: str
    entry: Entry
    arm: str
    init: str | None
    batches: str | None

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys of runs that must be there before."""
        return tuple(key for key in (self.init, self.batches) if key is not None)

    @property
    def runner(self) -> tuple[bool, str]:
        """Whether it is a program, and the name of the program or path."""
        spec = self.entry.arms[self.arm]
        return spec.program, spec.runner

    @property
    def host(self) -> Host:
        """What it may share a process with.  A program of its own imports what it will, when it will."""
        is_program, name = self.runner
        path = programs.beside(name) if is_program else name
        ranks = self.entry.arms[self.arm].ranks
        return Host(f"program {name}", ranks=ranks) if path is None else Host(path, path_info(path).needs, ranks)

    def missing(self) -> tuple[str, ...]:
        """Packages that it needs and that are not installed."""
        is_program, name = self.runner
        return programs.missing(name) if is_program else path_info(name).missing()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no trace of a run: `missing` packages, or an error and its slug (empty where it is none of ours)."""

    error: str
    slug: str = ""
    missing: tuple[str, ...] = ()


@dataclass(slots=True)
class Recorded:
    """The folder of traces, and the runs that have none."""

    folder: Path
    failures: dict[str, Failure] = field(default_factory=dict)

    def trace(self, key: str) -> Path:
        """Where the trace of a run is."""
        return self.folder / f"{key}.h5"


def key_of(entry: Entry, arm: str) -> str:
    """Name of the run of an arm, by content."""
    text = json.dumps(identity(entry.arms, arm), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def jobs_of(entries: Iterable[Entry]) -> dict[str, Job]:
    """Every different run of some entries by its key."""
    found: dict[str, Job] = {}
    for entry in entries:
        for name, spec in entry.arms.items():
            init, batches = (key_of(entry, source) if source else None for source in (spec.init, spec.batches))
            key = key_of(entry, name)
            found.setdefault(key, Job(key, entry, name, init, batches))
    return found


def record_all(entries: Sequence[Entry], folder: Path, *, workers: int, told: Told = lambda: None) -> Recorded:
    """Record what the entries need; `told` is called after each run, recorded or not."""
    recorded, runnable = Recorded(folder), []
    for job in jobs_of(entries).values():
        if _refused(job, recorded):
            told()
        else:
            runnable.append(job)

    def note(key: str, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            recorded.failures[key] = Failure(answer["error"], answer["slug"])
        told()

    schedule = Schedule([_task(job, recorded) for job in runnable], folder, note)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in [pool.submit(schedule.work) for _ in range(workers)]:
                done.result()
        finally:
            schedule.close()
    return recorded


def _refused(job: Job, recorded: Recorded) -> bool:
    """Note a run that cannot be here: a package is missing, for it or for the run that it builds on."""
    missing = job.missing()
    absent = next((recorded.failures[key] for key in job.sources if key in recorded.failures), None)
    if missing:
        recorded.failures[job.key] = Failure(f"needs {', '.join(missing)}", missing=missing)
    elif absent is not None:
        recorded.failures[job.key] = Failure(f"the run that it starts from failed: {absent.error}", "", absent.missing)
    return job.key in recorded.failures


def _task(job: Job, recorded: Recorded) -> Task:
    return Task(job.key, job.host, frozenset(job.sources), told_worker(job, recorded))


def told_worker(job: Job, recorded: Recorded) -> dict[str, Any]:
    """What a worker has to know to record a run."""
    spec = job.entry.arms[job.arm]
    return {
        "runner": spec.runner,
        "program": spec.program,
        "settings": dict(spec.settings),
        "options": dict(spec.options),
        "init_from": str(recorded.trace(job.init)) if job.init else None,
        "batches_from": str(recorded.trace(job.batches)) if job.batches else None,
        "record": dict(spec.record),
        "trace": str(recorded.trace(job.key)),
    }
