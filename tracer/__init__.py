"""Record what a training run does at every optimizer step into one HDF5 file.

    with tracer.record("run.h5"):
        train()

Importing this package imports nothing but the standard library: `trace diff` and `trace --help` start fast, and a
program under `trace record` gets no import that it did not ask for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tracer._version import VERSION as __version__

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager

    from tracer.reader import Trace
    from tracer.recorder import Recorder

__all__ = ["__version__", "declare", "log", "open", "record"]


def record(path: str | os.PathLike[str], **options: Any) -> AbstractContextManager[Recorder]:
    """Record everything that trains inside the `with` block into `path`.

    Options are the fields of `tracer.recorder.RecordOptions`, also in the words of the command line: `what="grad,param"`,
    `steps="1:5"`, `only="*.lora_A.*"`.  Raises BadUsage for a value that means nothing.  A compiled step must be built
    inside the block: one that was compiled before cannot be looked into.
    """
    from tracer.asked import understood
    from tracer.recorder import recording

    return recording(path, **understood(options))


def declare(**settings: Any) -> None:
    """Tell the running recorder, if there is one, a setting of this program: `declare(alpha=16)`."""
    recorder = _current()
    if recorder is not None:
        recorder.declare(settings)


def log(name: str, value: Any) -> None:
    """Record a named value of the current step (phase `eval`); does nothing when nothing records."""
    recorder = _current()
    if recorder is not None:
        recorder.log(name, value)


def open(path: str | os.PathLike[str]) -> Trace:
    """Open a trace for reading; raises a `tracer.errors.TraceError` that says what is wrong with it."""
    from tracer.reader import open_trace

    return open_trace(path)


def _current() -> Recorder | None:
    """The recorder of this process; a program that is not recorded must not pay for an import to learn that."""
    module = sys.modules.get("tracer.recorder")
    return module.current() if module is not None else None
