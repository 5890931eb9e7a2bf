"""Run the MLX training programs in processes of their own, and read what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer.dtypes import to_float64
from tracer.reader import Trace, open_trace
from tracer.schema import WHOLE_STEP, Phase, State

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
Values = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """A program that ran: its fingerprint, its own gradients, its trace (if recorded), what it said on stderr."""

    result: dict[str, Any]
    gradients: Values
    trace: Path | None
    stderr: str


Runner = Callable[..., Run]


def execute(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{PROGRAMS}", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def run_program(folder: Path, program: str, arguments: tuple[str, ...], recorded: bool) -> Run:
    result, trace = folder / "result.json", folder / "run.h5"
    # Loops take their name first, the trainer its result: both are told where to leave it.
    own = [arguments[0], str(result), *arguments[1:]] if program == "mlx_loops.py" else [str(result), *arguments]
    if arguments[0] == "made_before":
        done = execute(PROGRAMS / program, *own, *([str(trace)] if recorded else []))
    else:
        head = [PROGRAMS / "run_recorded.py", trace] if recorded else []
        done = execute(*head, PROGRAMS / program, *own)
    kept = Path(f"{result}.npz")
    gradients = dict(np.load(kept)) if kept.exists() else {}
    return Run(json.loads(result.read_text()), gradients, trace if recorded else None, done.stderr)


def traced(run: Run) -> Trace:
    """The trace of a recorded run."""
    assert run.trace is not None
    return open_trace(run.trace)


def values(trace: Trace, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> Values:
    """All values of a row, in the run's dtype; bfloat16 and others as float64."""
    row = trace.row(phase, step, micro_batch)
    assert row is not None, (phase, step, micro_batch)
    entries = row.layout.entries
    return {
        entry.name: row.read(i) if entry.dtype != "bfloat16" else to_float64(row.read(i), entry.dtype)
        for i, entry in enumerate(entries)
        # A tied head refers to a frozen embedding, of which only the digest is kept.
        if entry.stored and not (phase is Phase.INIT and entry.alias_of) and row.states[i] in (State.VALUE, State.ZERO)
    }


def states(trace: Trace, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> dict[str, State]:
    """State of each record of a row."""
    row = trace.row(phase, step, micro_batch)
    assert row is not None
    return {entry.name: State(row.states[i]) for i, entry in enumerate(row.layout.entries)}


def parameters_before(trace: Trace, step: int) -> Values:
    """Trained parameters before a step."""
    return values(trace, Phase.INIT, 0) if step == 1 else values(trace, Phase.PARAM, step - 1)
