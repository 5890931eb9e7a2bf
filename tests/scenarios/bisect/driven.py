"""`trace bisect` and `trace sweep` in this process, as typed; what they record runs in processes of its own."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from tracer.cli.main import main

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


def trace(*arguments: object) -> Done:
    """Exit code and output of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())
