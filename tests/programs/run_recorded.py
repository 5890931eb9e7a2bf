"""Run an unmodified program under the recorder: `run_recorded.py TRACE PROGRAM [ARGUMENTS…]`, or `-m MODULE` for PROGRAM."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import tracer


def main() -> None:
    """Record the program given on the command line."""
    trace, *command = sys.argv[1:]
    with tracer.record(trace):
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
