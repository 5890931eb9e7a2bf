"""Program: record several arms of one path, or of one program, one after another in one process.

    python -m scenarios.catalogue.worker ARMS.json

An arm is {"runner", "program", "settings", "options", "init_from", "batches_from", "record", "trace"}.  Importing a
framework takes longer than training a tiny model, so arms of one runner share a process; each has a recorder of its own.
After each arm one line of JSON goes to the stream that was standard output at the start: the trace and, if it
failed, the error as a user would read it.  What the runs print is kept out of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tracer
from scenarios import run as training
from scenarios.catalogue.programs import program
from scenarios.config import load
from scenarios.feed import make_feed
from tracer.errors import TraceError
from tracer.reader import open_trace
from tracer.recorder import DEFAULT_PHASES
from tracer.schema import Phase


def main(given: Path) -> None:
    """Record the arms of a file."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for arm in json.loads(given.read_text("utf-8")):
        answer = {"trace": arm["trace"], **record(arm)}
        print(json.dumps(answer), file=answers, flush=True)


def record(arm: Mapping[str, Any]) -> dict[str, str]:
    """Record one arm; empty, or `error` and its `slug` if it has one.  The trace appears when it is whole."""
    written = Path(arm["trace"]).with_suffix(".part")
    asked = dict(arm["record"])
    what = DEFAULT_PHASES | ({Phase.FORWARD} if asked.pop("forward", False) else frozenset())
    try:
        with tracer.record(written, overwrite=True, what=what, **asked):
            train(arm)
        with open_trace(written) as trace:
            if not trace.finished:
                return {"error": f"recording stopped after step {max(trace.steps)}: {trace.end}", "slug": ""}
    except TraceError as error:
        return {"error": error.line(), "slug": error.slug}
    except Exception as error:  # noqa: BLE001 - a program may raise anything; it is the arm's error
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "slug": ""}
    os.replace(written, arm["trace"])
    return {}


def train(arm: Mapping[str, Any]) -> None:
    """Run the arm's path or program."""
    settings = tuple(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in arm["settings"].items())
    init_from, batches_from = (Path(arm[key]) if arm[key] else None for key in ("init_from", "batches_from"))
    if not arm["program"]:
        with contextlib.redirect_stdout(sys.stderr):
            training.run(arm["runner"], None, settings, init_from=init_from, batches_from=batches_from)
        return
    config = load(None, settings)
    tracer.declare(path=arm["runner"], **config.flat())
    feed = make_feed(config, init_from=init_from, batches_from=batches_from)
    with contextlib.redirect_stdout(sys.stderr):
        program(arm["runner"]).run(config, feed, **arm["options"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
