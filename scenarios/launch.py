"""Start training runs in processes of their own, recorded or not.

One process per run, because a training library may change its framework for the whole process (mlx-lm's gradient
checkpointing patches layer classes).  What a run prints goes to stderr, shown only when the run fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tracer.errors import TraceError
from tracer.interpreters import lent
from tracer.reader import open_trace

_TAIL: Final = 12


class RunFailed(TraceError):
    """A training run that ended with an error."""

    slug = "run-failed"


@dataclass(frozen=True, slots=True)
class Arm:
    """One run: a path, its settings (dotted keys, or `defaults`), and what it takes from another's trace.

    `python`: the interpreter of another environment; None is the one that runs us.
    """

    path: str
    settings: Mapping[str, Any]
    init_from: Path | None = None
    batches_from: Path | None = None
    python: Path | None = None

    def arguments(self) -> list[str]:
        """Options of `scenarios.run`, and of `trace record --path`."""
        given = [f"{key}={_toml(value)}" for key, value in self.settings.items()]
        options = [part for setting in given for part in ("--set", setting)]
        for flag, file in (("--init-from", self.init_from), ("--batches-from", self.batches_from)):
            options += [flag, str(file)] if file is not None else []
        return options


def record_command(arm: Arm, trace: Path, options: Sequence[str] = ()) -> list[str]:
    """Command line that records an arm into `trace`, as a user would type it after `trace`; `options` are of `trace record`."""
    other = ["--python", str(arm.python)] if arm.python is not None else []
    return ["record", "--force", "-o", str(trace), "--path", arm.path, *options, *other, *arm.arguments()]


def record(arm: Arm, trace: Path, options: Sequence[str] = ()) -> Path:
    """Record an arm; raises RunFailed where the run failed, or where it went on after recording had stopped.

    `options`: of `trace record`.
    """
    said = _run(["tracer", *record_command(arm, trace, options)], arm.path)
    with open_trace(trace) as written:
        if not written.finished:
            raise RunFailed(f"recording path {arm.path} stopped after step {max(written.steps)}: {said}")
    return trace


def run(arm: Arm, outcome: Path, *, trace: Path | None = None, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run an arm and return its outcome (see `Outcome.summary`), recorded into `trace` if that is given.

    `options`: of `trace record`.
    """
    program = ["scenarios.run", arm.path, *arm.arguments(), "--outcome", str(outcome)]
    if trace is not None:
        program = ["tracer", "record", "--force", "-o", str(trace), *options, "--", "-m", *program]
    with lent(arm.python) as ours:
        _run(program, arm.path, python=arm.python, environment=ours)
    result: dict[str, Any] = json.loads(outcome.read_text("utf-8"))
    return result


def _run(
    module: Sequence[str], path: str, *, python: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """Run `python -m …`; what this project printed on stderr, as one line.  Raises RunFailed."""
    command = [str(python or sys.executable), "-m", *module]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    known = [line for line in lines if line.startswith("trace: ")]
    if done.returncode != 0:
        said = known[0] if known else " | ".join(lines[-_TAIL:])
        raise RunFailed(f"the run on path {path} ended with exit code {done.returncode}: {said}")
    return " ".join(known)


def _toml(value: Any) -> str:
    """A value as `--set` reads it; JSON's strings, numbers, lists and booleans are TOML's."""
    return value if isinstance(value, str) else json.dumps(value)
