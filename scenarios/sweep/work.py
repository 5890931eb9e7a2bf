"""One task of a sweep, done in a worker: record its runs in warm processes, compare or judge, answer with a small result.

A worker is a process of a local pool or of a Dask cluster; nothing but tasks and results passes between it and the
sweep, so that it needs no common folder.  Each run has one thread unless told otherwise: where it ran must not show in its bits.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from scenarios.bisect.jobs import Job
from scenarios.hosts import Hosts
from scenarios.launch import Arm, RunFailed
from scenarios.sweep.plan import Task
from tracer.errors import TraceError

# References that a worker keeps, so that the cells of a seed share theirs.
_KEPT: Final = 4


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a task: `passed` is None where it gave no answer, which `error` explains.

    `first` is the first finding as in the JSON report of a comparison, `value` what a threshold judged.
    """

    cell: int
    seed: int
    column: str
    passed: bool | None
    value: float | None = None
    first: Mapping[str, Any] | None = None
    cause: str = ""
    error: str = ""
    runs: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Worker:
    """Warm processes and kept references of one worker thread."""

    threads: int
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="trace-sweep-")
    )
    hosts: Hosts = field(default_factory=Hosts)
    references: OrderedDict[str, Path] = field(default_factory=OrderedDict)
    runs: int = 0
    # References that failed in the sweep at hand: the other cells of their seed need not run them again.
    failed: dict[str, RunFailed] = field(default_factory=dict)
    sweep: str = ""

    def do(self, task: Task, policy: Any, sweep: str = "") -> Result:
        """Do one task of a sweep; an error becomes a result without an answer."""
        if sweep != self.sweep:
            self.sweep, self.failed = sweep, {}
        began, before = time.monotonic(), self.runs
        result = Result(task.cell, task.seed, task.column, None)
        try:
            result = self._answer(task, policy, result)
        except TraceError as error:
            result = replace(result, error=error.line())
        return replace(result, runs=self.runs - before, seconds=time.monotonic() - began)

    def _answer(self, task: Task, policy: Any, result: Result) -> Result:
        trace = Path(self.folder.name, "run.h5")
        if task.reference is None:
            value = task.rule.value(self._record(task.run, trace, None))
            return replace(result, passed=task.rule.passes(value), value=value)
        reference = self._reference(task.reference)
        self._record(task.run, trace, reference if task.share else None)
        return _compared(reference, trace, policy, result)

    def _reference(self, job: Job) -> Path:
        key = job.key()
        if key in self.failed:
            raise self.failed[key]
        if key not in self.references:
            while len(self.references) >= _KEPT:
                self.references.popitem(last=False)[1].unlink(missing_ok=True)
            try:
                self.references[key] = self._record(job, Path(self.folder.name, f"{key}.h5"), None)
            except RunFailed as error:
                self.failed[key] = error
                raise
        self.references.move_to_end(key)
        return self.references[key]

    def _record(self, job: Job, trace: Path, source: Path | None) -> Path:
        self.runs += 1
        arm = Arm(job.path, dict(job.settings or {}), init_from=source, batches_from=source)
        return self.hosts.record(arm, trace, threads=self.threads)

    def close(self) -> None:
        """End the processes, remove the traces."""
        self.hosts.close()
        self.folder.cleanup()


def _compared(reference: Path, trace: Path, policy: Any, result: Result) -> Result:
    from differ import DiffOptions, Verdict, diff
    from differ.reporters import words

    found = diff(reference, trace, DiffOptions(policy=policy))
    if found.verdict is Verdict.INCOMPARABLE:
        return replace(result, error="the two runs have nothing in common that could be compared")
    told = [words.elsewhere(cause, found.first) + cause.summary for cause in words.causes(found)]
    passed, first = found.verdict is Verdict.SAME, found.to_dict()["first"]
    return replace(result, passed=passed, first=first, cause=told[0] if told else "")


_local = threading.local()
_all: list[Worker] = []


def work(task: Task, policy: Any, threads: int, sweep: str) -> Result:
    """Do a task of a sweep in this worker's thread; a worker of a cluster may outlive the sweep."""
    worker: Worker | None = getattr(_local, "worker", None)
    if worker is None:
        worker = _local.worker = Worker(threads)
        _all.append(worker)
        if len(_all) == 1:
            atexit.register(close_all)
    return worker.do(task, policy, sweep)


def close_all() -> None:
    """End everything that this process's workers started."""
    for worker in _all:
        worker.close()


def prepare() -> None:
    """Start of a local worker: Ctrl-C is the sweep's business, and being told to end takes the warm processes along."""
    import signal

    def end(*_: object) -> None:
        try:
            for worker in _all:
                worker.hosts.kill()  # their pipes may be in use just now, by this very thread
                worker.folder.cleanup()
        finally:
            os._exit(143)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
