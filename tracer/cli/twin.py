"""`trace record --twin`: run a program again, changed by no more than rounding, to measure how far rounding carries it.

Every run has a process of its own.  A twin is the same command with one thing changed:

    rounding   trained parameters, frozen ones of 16 bits (with --perturb-base all) start one rounding unit away
    threads    another number of threads in OpenMP and BLAS, which changes the order of sums
    eager      no compilation, where the run was compiled
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from tracer.errors import BadUsage, NotFound, RecordingStopped
from tracer.perturb import Perturbation
from tracer.reader import Trace, open_trace
from tracer.schema import Phase

KINDS: Final = ("rounding", "threads", "eager")
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_EAGER: Final = {"MLX_DISABLE_COMPILE": "1", "TORCH_COMPILE_DISABLE": "1"}

# Runs the command once: (trace, the perturbation to pass on, changed environment) -> exit code.
Run = Callable[[Path, Perturbation | None, Mapping[str, str]], int]


class Kinds(click.ParamType[Any]):
    """`rounding,threads`: ways to make a twin."""

    name = "kinds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The kinds, in the order given."""
        if isinstance(value, tuple):
            return value
        kinds = tuple(word.strip() for word in str(value).split(","))
        for kind in kinds:
            if kind not in KINDS:
                self.fail(f"{kind!r} is no kind of twin; kinds are {', '.join(KINDS)}", param, ctx)
        return kinds


@dataclass(frozen=True, slots=True)
class TwinOptions:
    """Which twins to make: `kinds`, how many of `rounding`, and whether those move the frozen weights too."""

    kinds: tuple[str, ...]
    count: int = 1
    base: bool = False

    def files(self, output: Path) -> Iterator[tuple[Path, Perturbation]]:
        """Name and perturbation of every twin of `output`: run.twin.h5, run.twin-2.h5, run.twin-threads.h5."""
        for kind in dict.fromkeys(self.kinds):
            if kind != "rounding":
                yield twin_path(output, kind), Perturbation(kind)
                continue
            for seed in range(1, self.count + 1):
                yield twin_path(output, "" if seed == 1 else str(seed)), Perturbation(kind, seed, self.base)


def twin_path(output: Path, ending: str) -> Path:
    """`run.h5` -> `run.twin.h5`, `run.twin-threads.h5`."""
    return output.with_name(f"{output.stem}.twin{'-' * bool(ending)}{ending}{output.suffix}")


def record_twins(output: Path, options: TwinOptions, run: Run, *, force: bool) -> int:
    """Record the run and then its twins; the first exit code that is not 0 ends it.

    Raises BadUsage before anything runs if a file is there already, RecordingStopped for a twin that is none.
    """
    planned = list(options.files(output))
    for path in (output, *(path for path, _ in planned)):
        if path.exists() and not force:
            raise BadUsage(f"{path} exists", "give --force to replace it")
    code = run(output, None, {})
    for path, twin in planned:
        if code:
            return code
        code = _record_twin(output, path, twin, run)
    return code


def _record_twin(output: Path, path: Path, twin: Perturbation, run: Run) -> int:
    changed: Mapping[str, str] = {}
    if twin.by == "threads":
        changed = dict.fromkeys(_THREADS, "2" if _threads() == 1 else "1")
    elif twin.by == "eager":
        with open_trace(output) as trace:
            if not trace.observed.get("compiled"):
                print(f"trace: no {path.name}: {output.name} is not compiled", file=sys.stderr)
                return 0
        changed = _EAGER
    code = run(path, twin, changed)
    if code == 0:
        _say_how_far(output, path)
    return code


def _threads() -> int:
    """Threads that a run uses by default here."""
    for name in _THREADS:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return os.cpu_count() or 1


def _say_how_far(output: Path, path: Path) -> None:
    """Check that the twin is whole, and say so if it measures nothing."""
    try:
        with open_trace(path) as twin:
            reason = "" if twin.finished else str(twin.end.get("reason") or "it was cut off")
    except NotFound:
        reason = "its start was not moved, and nothing was recorded"
    with open_trace(output) as trace:
        if reason and trace.finished:
            raise RecordingStopped(f"{path.name} is no twin: {reason}", "its recording said why, above")
    with open_trace(output) as trace, open_trace(path) as twin:
        if all(_same_bits(trace, twin, phase) for phase in (Phase.LOSS, Phase.GRAD, Phase.PARAM, Phase.INIT)):
            print(f"trace: {path.name} is the same to the bit as {output.name}: it measures no noise", file=sys.stderr)


def _same_bits(trace: Trace, twin: Trace, phase: Phase) -> bool:
    seals = [[(row.step, row.micro_batch, row.seal) for row in side.rows(phase)] for side in (trace, twin)]
    return seals[0] == seals[1]
