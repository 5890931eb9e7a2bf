"""Record the arms of the entries asked for, each different run once, into one folder.

A run is known by its content (`entry.identity`), so entries that have an arm in common share its trace.  Arms that take
adapters or batches from another are recorded after it, in waves.  One process records several arms, but never of two paths:
a training library may change its framework for the whole process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scenarios.catalogue import programs
from scenarios.catalogue.entry import Entry, identity
from scenarios.paths import path_info

# An arm of one process more than this many goes to another process, where there is one free.
_LEAST_IN_PROCESS: Final = 4
_TAIL: Final = 6
# Arms are tiny runs; a process that takes longer than this hangs, seconds.
TIMEOUT: Final = 600.0
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
        """Program or path, and its name: what may share a process."""
        spec = self.entry.arms[self.arm]
        return spec.program, spec.runner

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
    jobs, recorded = jobs_of(entries), Recorded(folder)
    waiting = dict(jobs)
    with ThreadPoolExecutor(workers) as pool:
        while waiting:
            ready = [job for job in waiting.values() if not any(source in waiting for source in job.sources)]
            for job in ready:
                del waiting[job.key]
            runnable = [job for job in ready if not _refused(job, recorded, told)]
            batches = _batches(runnable, workers)
            for failures in pool.map(lambda batch: _record(batch, recorded, told), batches):
                recorded.failures |= failures
    return recorded


def _refused(job: Job, recorded: Recorded, told: Told) -> bool:
    """Note a run that cannot start: a package is missing, or the run that it builds on has failed."""
    missing = job.missing()
    failed = next((recorded.failures[key] for key in job.sources if key in recorded.failures), None)
    if missing:
        recorded.failures[job.key] = Failure(f"needs {', '.join(missing)}", missing=missing)
    elif failed is not None:
        recorded.failures[job.key] = Failure(f"the run that it starts from failed: {failed.error}", "", failed.missing)
    else:
        return False
    told()
    return True


def _batches(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs by runner, the largest group first; groups are divided so that no worker is idle at the end."""
    groups: dict[tuple[bool, str], list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.runner].append(job)
    size = max(_LEAST_IN_PROCESS, -(-len(jobs) // max(1, workers)))
    parts = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return sorted(parts, key=len, reverse=True)


def _record(batch: Sequence[Job], recorded: Recorded, told: Told) -> dict[str, Failure]:
    """Record some runs in one process; the failures by key."""
    given, log = (recorded.folder / f"{batch[0].key}.{kind}" for kind in ("json", "log"))
    given.write_text(json.dumps([_told_worker(job, recorded) for job in batch]), "utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "scenarios.catalogue.worker", str(given)]
    answers, code = _follow(command, log, told)
    failures = {}
    for job in batch:
        answer = answers.get(job.key)
        if answer is None:  # the process died before it came to this run, or in it
            failures[job.key] = Failure(_last_words(log, code))
            told()
        elif "error" in answer:
            failures[job.key] = Failure(answer["error"], answer["slug"])
    given.unlink()
    if not failures:
        log.unlink()
    return failures


def _follow(command: Sequence[str], log: Path, told: Told) -> tuple[dict[str, dict[str, str]], int]:
    """Run a worker: what it answered of each run, by key, and its exit code.  One that hangs is killed."""
    answers = {}
    with (
        log.open("wb") as said,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, env=_environment()
        ) as process,
    ):
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout or ():
                answer = json.loads(line)
                answers[Path(answer["trace"]).stem] = answer
                told()
            return answers, process.wait()
        finally:
            timer.cancel()
            process.kill()


def _told_worker(job: Job, recorded: Recorded) -> dict[str, Any]:
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


def _environment() -> Mapping[str, str]:
    """One thread a process, which is faster for tiny models, and a checkout that is not installed works too."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}


def _last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return f"its process ended with exit code {code}: {' | '.join(lines[-_TAIL:]) or 'it printed nothing'}"
