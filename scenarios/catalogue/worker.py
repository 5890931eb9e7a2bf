"""Program: record arms, one after another in one process.

    python -m scenarios.catalogue.worker [PACKAGE]...

It imports the packages, then reads one arm a line from standard input, as JSON: {"runner", "program", "settings",
"options", "init_from", "batches_from", "record", "trace"}.  Each has a recorder of its own, and finds random states, environment
and warning filters as they were at the start.  After each arm one line of JSON goes to the stream that was standard output
at the start: if it failed, the `error` as a user would read it, and what it `left` behind that may change the next.  What runs
print is kept out of it.

Under torchrun the first rank reads and answers.  It tells the others in a file, and answers when all traces are there; one of the
others that fails ends its process, and torchrun then ends all.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tracer
from scenarios import run as training
from scenarios.catalogue.processes import ASKED
from scenarios.catalogue.programs import program
from scenarios.catalogue.surroundings import Surroundings
from scenarios.config import load
from scenarios.feed import make_feed
from tracer.errors import TraceError
from tracer.place import Place, place, rank_files
from tracer.reader import open_trace
from tracer.recorder import DEFAULT_PHASES
from tracer.schema import Phase

# Between two looks at a file that another rank writes, seconds.
_LOOK_AGAIN: Final = 0.02


def main(packages: Sequence[str]) -> None:
    """Record the arms that are asked for until standard input ends."""
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    for package in packages:
        importlib.import_module(package)
    surroundings = Surroundings()
    here = place()
    for line in asked if here is None else _shared(asked, here):
        surroundings.restore()
        _settle()
        result = record(json.loads(line))
        if here is not None and here.rank > 0:
            if result:
                sys.exit(result["error"])
            continue
        print(json.dumps({**result, "left": surroundings.left()}), file=answers, flush=True)


def _shared(asked: Iterable[str], here: Place) -> Iterator[str]:
    """What the first rank is asked, for every rank: line after line of a file, the last one empty."""
    file = Path(os.environ[ASKED])
    if here.rank == 0:
        with file.open("w", encoding="utf-8") as told:
            for line in itertools.chain(asked, ["\n"]):
                told.write(line)
                told.flush()
                if line.strip():
                    yield line
        return
    known = 0
    while True:
        lines = file.read_text("utf-8").splitlines(keepends=True) if file.exists() else []
        if len(lines) > known and lines[known].endswith("\n"):
            known += 1
            if not lines[known - 1].strip():
                return
            yield lines[known - 1]
        time.sleep(_LOOK_AGAIN)


def _gathered(trace: Path, here: Place) -> None:
    """Wait until every rank's trace is there."""
    while len(rank_files(trace)) < here.world_size:
        time.sleep(_LOOK_AGAIN)


def _settle() -> None:
    """Drop the last arm, and take what is there for good out of the collector's lists, which a recorder looks through."""
    gc.collect()
    gc.freeze()


def record(arm: Mapping[str, Any]) -> dict[str, str]:
    """Record one arm; empty, or `error` and its `slug` if it has one.  The trace appears when it is whole."""
    trace, here = Path(arm["trace"]), place()
    part = trace.with_suffix(".part")
    written, final = (part, trace) if here is None else (here.file(part), here.file(trace))
    asked = dict(arm["record"])
    asked["modules"] = tuple(asked.get("modules", ()))
    what = DEFAULT_PHASES | ({Phase.FORWARD} if asked.pop("forward", False) else frozenset())
    try:
        with tracer.record(part, overwrite=True, what=what, **asked):
            train(arm)
        with open_trace(written) as opened:
            if not opened.finished:
                return {"error": f"recording stopped after step {max(opened.steps)}: {opened.end}", "slug": ""}
    except TraceError as error:
        return {"error": error.line(), "slug": error.slug}
    except Exception as error:  # noqa: BLE001 - a program may raise anything; it is the arm's error
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "slug": ""}
    os.replace(written, final)
    if here is not None and here.rank == 0:
        _gathered(trace, here)
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
    main(sys.argv[1:])
