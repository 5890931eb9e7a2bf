"""The oracle of a bisection: record two runs, compare them, remember both.

Every run that is recorded is counted, those that fail too; one that the cache knows costs nothing and is counted apart.
Traces are dropped once they were compared, unless they may be a base again (`keep`).

Invariant: the cache answers only with what the settings decide.  A run may fail for a reason of its own (memory, a signal, a
package that is not there), so a failure holds for this bisection, in which it is not run twice, and for no later one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from differ import DiffOptions, diff
from differ.policy import Policy, default_policy
from scenarios.bisect.environments import Environments, NoEnvironment
from scenarios.bisect.jobs import Job, code_digest, digest
from scenarios.bisect.store import Store
from scenarios.hosts import Hosts
from scenarios.launch import Arm, RunFailed, record
from tracer.errors import TraceError
from tracer.reader import open_trace

_TAIL: Final = 12
SAME: Final = "same"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"
_EXPLAINS_NOTHING: Final = "config.differs"


class BudgetSpent(TraceError):
    """As many runs, or as much time, as was allowed."""

    slug = "budget"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a comparison said: a verdict, or `failed` with an error; first finding and causes as in the JSON report."""

    verdict: str
    first: Mapping[str, Any] | None = None
    causes: tuple[Mapping[str, Any], ...] = ()
    margin: float = 0.0
    error: str = ""


@dataclass(slots=True)
class Counts:
    """Runs recorded now, how many failed, runs known from the cache, comparisons, seconds of recording."""

    recorded: int = 0
    failed: int = 0
    cached: int = 0
    compared: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Runs:
    """Records and compares jobs, within a budget.

    `max_seconds` counts from `began`.  `telling` is called with a line before each run.  `hosts`: warm processes to
    record in, instead of a process for each run.
    """

    store: Store
    max_runs: int | None = None
    max_seconds: float | None = None
    policy: Policy = field(default_factory=default_policy)
    hosts: Hosts | None = None
    keep: bool = False
    telling: Callable[[str], None] = lambda _: None
    counts: Counts = field(default_factory=Counts)
    began: float = field(default_factory=time.monotonic)
    environments: Environments = field(init=False)
    _known: set[str] = field(default_factory=set)
    # What failed in this bisection: errors by run, answers by pair.
    _failed: dict[str, str] = field(default_factory=dict)
    _unanswered: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environments = Environments(self.store)

    def compare(self, a: Job, b: Job, about: str = "") -> Answer:
        """Verdict on two runs; records what is not known.  Raises BudgetSpent, or an error that no other run would cure."""
        if a.key() == b.key():
            return Answer(SAME)
        key = digest([a.key(), b.key(), code_digest("differ"), repr(self.policy)])
        if key in self._unanswered:
            return self._unanswered[key]
        known = self.store.read("diffs", key)
        if known is not None and known["verdict"] != FAILED:
            self._count_known(a, b)
            return Answer(known["verdict"], known["first"], tuple(known["causes"]), known["margin"], known["error"])
        answer = self._compare(a, b, about)
        self.counts.compared += 1
        if answer.verdict == FAILED:
            self._unanswered[key] = answer
            return answer
        body = {"verdict": answer.verdict, "first": answer.first, "causes": list(answer.causes)}
        self.store.write("diffs", key, body | {"margin": answer.margin, "error": answer.error})
        return answer

    def _count_known(self, *jobs: Job) -> None:
        new = {job.key() for job in jobs} - self._known
        self.counts.cached += len(new)
        self._known |= new

    def _compare(self, a: Job, b: Job, about: str) -> Answer:
        try:
            # One that failed the last time first: if it fails again, the other need not be recorded.
            traces = {
                job.key(): self.trace(job, about) for job in sorted((a, b), key=self._failed_before, reverse=True)
            }
        except (RunFailed, NoEnvironment) as error:
            return Answer(FAILED, error=str(error))
        result = diff(traces[a.key()], traces[b.key()], DiffOptions(policy=self.policy)).to_dict()
        told = [cause for cause in result["causes"] if cause["id"] != _EXPLAINS_NOTHING]
        return Answer(result["verdict"], result["first"], tuple(told), float(result["margin"]))

    def trace(self, job: Job, about: str = "") -> Path:
        """The trace of a job, recorded if it is not there.  Raises RunFailed, NoEnvironment, BudgetSpent."""
        key = job.key()
        if key in self._failed:
            raise RunFailed(self._failed[key])
        again = self._failed_before(job)
        if not again and self.store.read("runs", key) is not None and self.store.trace(key).is_file():
            self._count_known(job)
            return self.store.trace(key)
        sources = [self.trace(source) if source is not None else None for source in (job.init_from, job.batches_from)]
        self._require_budget()
        self.telling(f"{about} (failed the last time, tried again)" if again else about)
        self._record(job, *sources)
        return self.store.trace(key)

    def _failed_before(self, job: Job) -> bool:
        known = self.store.read("runs", job.key())
        return known is not None and bool(known["error"])

    def _require_budget(self) -> None:
        if self.max_runs is not None and self.counts.recorded >= self.max_runs:
            raise BudgetSpent(
                f"{self.counts.recorded} runs were recorded", "allow more with --max-runs; the cache is kept"
            )
        if self.max_seconds is not None and time.monotonic() - self.began >= self.max_seconds:
            raise BudgetSpent(
                f"{self.max_seconds:g} s are over, {self.counts.recorded} runs were recorded",
                "allow more with --max-time; the cache is kept",
            )

    def _record(self, job: Job, init_from: Path | None, batches_from: Path | None) -> None:
        """Record and remember; a run that failed is remembered as failed for now, noted in the cache and raised."""
        key, began = job.key(), time.monotonic()
        self.store.prepare("runs")
        python = job.python or sys.executable
        if job.pins is not None:
            python = self.environments.interpreter(job.pins, job.make)
        # Beside and renamed: a trace that is there is whole.
        beside = self.store.trace(f"{key}.{os.getpid()}")
        self.counts.recorded += 1
        self._known.add(key)
        error = ""
        try:
            other = Path(python) if job.pins is not None or job.python else None
            self._run(job, Arm(job.path, dict(job.settings or {}), init_from, batches_from, other), beside, python)
            beside.replace(self.store.trace(key))
        except RunFailed as failure:
            self._failed[key] = error = str(failure)
            self.counts.failed += 1
        finally:
            beside.unlink(missing_ok=True)
            self.counts.seconds += time.monotonic() - began
        entry = {"error": error, "seconds": time.monotonic() - began, "job": job.content()}
        self.store.write("runs", key, entry | {"digest": "" if error else trace_digest(self.store.trace(key))})
        if error:
            raise RunFailed(error)

    def _run(self, job: Job, arm: Arm, trace: Path, python: str) -> None:
        options = ["--steps", f"1:{job.steps}", *(["--what", job.what] if job.what else [])]
        if job.program:
            _record_program([*options, "--", python, *job.program], trace)
        elif self.hosts is not None:
            self.hosts.record(arm, trace, what=job.what, steps=job.steps)
        else:
            record(arm, trace, options)

    def forget_traces(self, *but: Job) -> None:
        """Drop the traces that were recorded, except those of the given jobs and what they take from others."""
        if self.keep:
            return
        kept = {job.key() for job in _with_sources(but)}
        for key in self._known - kept:
            self.store.drop_trace(key)


def _with_sources(jobs: tuple[Job, ...]) -> Iterator[Job]:
    for job in jobs:
        yield job
        yield from _with_sources(tuple(s for s in (job.init_from, job.batches_from) if s is not None))


def _record_program(words: list[str], trace: Path) -> None:
    """Record a program of the user's own, as `trace record WORDS` does.  Raises RunFailed."""
    command = [sys.executable, "-m", "tracer", "record", "--force", "-o", str(trace), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode != 0:
        raise RunFailed(f"the program ended with exit code {done.returncode}: {' | '.join(lines[-_TAIL:])}")
    with open_trace(trace) as written:
        if not written.finished:
            raise RunFailed(f"recording stopped after step {written.last_step}: {lines[-1] if lines else ''}")


def trace_digest(path: Path) -> str:
    """Digest of the seals of all rows of a trace: equal for equal records, whatever the file's other bytes are."""
    with contextlib.ExitStack() as stack:
        trace = stack.enter_context(open_trace(path))
        seals = []
        for phase in trace.phases:
            for step in trace.steps:
                for micro_batch in trace.micro_batches(phase, step):
                    row = trace.row(phase, step, micro_batch)
                    if row is not None:
                        seals.append([phase.label, step, micro_batch, row.seal.hex()])
        return digest(seals)
