"""What `trace record` says and does about a program that trained in other processes, one trace per rank."""

from __future__ import annotations

import sys
from pathlib import Path

from tracer.errors import TraceError
from tracer.place import place, rank_files, restarted
from tracer.reader import open_trace
from tracer.size import human_bytes


def ranks_recorded(output: Path, *, fingerprint: bool) -> bool:
    """Report the ranks' traces beside `output`, if there are any; of this process's own there was nothing to record.

    With `fingerprint` they become one file, `output`, since a sketch of a part says nothing of the whole.  A process that is a
    rank itself leaves all of that alone: the others may still be writing.
    """
    files = {} if place() is not None else rank_files(output)
    if not files:
        return False
    output.unlink(missing_ok=True)
    if list(files) == [0] and _was_alone(files[0]):
        # A launcher that started one process: its trace is the run's.
        files = {0: files[0].replace(output)}
    for again in restarted(output):
        print(f"trace: also wrote {again}: an attempt after a failure", file=sys.stderr)
    size = human_bytes(sum(file.stat().st_size for file in files.values()))
    names = ", ".join(str(file) for file in files.values())
    try:
        with open_trace(output) as trace:
            steps, whole = trace.last_step, trace.finished
    except TraceError as error:
        print(f"trace: wrote {names}: {size}; {error.line()}", file=sys.stderr)
        return True
    if fingerprint:
        from tracer.shrink import shrink_in_place

        shrink_in_place(output)
        for file in files.values():
            if file != output:
                file.unlink()
        names, size = str(output), human_bytes(output.stat().st_size)
    end = "" if whole else ", unfinished"
    print(f"trace: wrote {names}: {steps} step{'s' * (steps != 1)}, {size}{end}", file=sys.stderr)
    return True


def _was_alone(file: Path) -> bool:
    """Whether the process that wrote this file had no other rank beside it."""
    try:
        with open_trace(file) as trace:
            return trace.env.get("world_size") == 1
    except TraceError:
        return False
