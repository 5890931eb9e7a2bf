"""Recording in the processes that a program starts: each rank of a distributed run writes a trace of its own.

`trace record -- torchrun … train.py` trains in children.  They are reached through the environment: PYTHONPATH gets a
folder with a `sitecustomize` (tracer/injected), which calls `join` in every Python that has a rank.  The first Python of a
rank takes the task out of its environment, so that what it starts in turn (workers that load data) sees nothing of us, and
begins to record when it imports a framework.  `python -I`, `-E` and `-S` never look, and run as ever.

Invariant: nothing that goes wrong in here reaches the run.  Imports the standard library only until recording begins.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import pickle
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tracer.backends import ImportWatcher
from tracer.errors import BadUsage, NothingRecorded, TraceError
from tracer.place import place, rank_files, restarted, set_launch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tracer.recorder import Recorder

# The task of the children; the name is known to tracer/injected/sitecustomize.py too.
TASK: Final = "STEPTRACE_CHILDREN"
SEARCH_PATH: Final = "PYTHONPATH"
INJECTED: Final = Path(__file__).parent / "injected"
# What a rank that trains imports; before that there is nothing to record.
FRAMEWORKS: Final = frozenset({"torch", "mlx.core"})


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank is to do.  `search_path`: PYTHONPATH as it was; `options`: those of `tracer.record`, packed, since looking
    at them imports numpy."""

    output: str
    launch: str
    search_path: str | None
    options: str

    def unpacked(self) -> dict[str, Any]:
        """The options for this rank; only the first says what it will write."""
        options: dict[str, Any] = pickle.loads(base64.b64decode(self.options))
        here = place()
        options["announce"] = bool(options.get("announce")) and here is not None and here.rank == 0
        return options


# In the process that starts them.


@contextlib.contextmanager
def children_recorded(output: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Every rank that is started inside the block records itself into its file beside `output`.

    A process that is a rank itself starts nobody that is one.  Raises BadUsage if files of ranks are there already and
    `overwrite` is not among the options; else they are removed, since ranks that come no more would be taken for this run's.
    """
    if place() is not None:
        yield
        return
    old = [*rank_files(output).values(), *restarted(output)]
    if old and not options.get("overwrite"):
        raise BadUsage(f"{old[0]} exists already", "choose another name, or --force to replace it")
    for file in old:
        file.unlink(missing_ok=True)
    before = {name: os.environ.get(name) for name in (TASK, SEARCH_PATH)}
    packed = base64.b64encode(pickle.dumps(dict(options))).decode()
    task = Task(str(output.absolute()), uuid.uuid4().hex, before[SEARCH_PATH], packed)
    os.environ[TASK] = json.dumps(asdict(task))
    # An empty entry means the current folder, so none is made.
    os.environ[SEARCH_PATH] = os.pathsep.join(filter(None, (str(INJECTED), before[SEARCH_PATH])))
    try:
        yield
    finally:
        for name, value in before.items():
            _set(name, value)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# In a rank.


def join() -> None:
    """Take the task, if this process has a rank, and record from the first import of a framework on."""
    task = Task(**json.loads(os.environ[TASK]))
    set_launch(task.launch)
    if place() is None:
        set_launch("")
        return
    os.environ.pop(TASK)
    _set(SEARCH_PATH, task.search_path)
    watcher = ImportWatcher(lambda _: _begin(task, watcher))
    watcher.wanted = FRAMEWORKS
    sys.meta_path.insert(0, watcher)


def _begin(task: Task, watcher: ImportWatcher) -> None:
    watcher.wanted = frozenset()
    with contextlib.suppress(ValueError):
        sys.meta_path.remove(watcher)
    try:
        from tracer.recorder import current, recording

        if current() is not None:
            return
        context = recording(task.output, **task.unpacked())
        recorder = context.__enter__()
    except TraceError as error:
        _say(f"this rank is not recorded: {error.line()}")
    except Exception as error:  # noqa: BLE001 - the run must go on
        _say(f"this rank is not recorded: {type(error).__name__}: {error}")
    else:
        atexit.register(_end, context, recorder, os.getpid())


def _end(context: AbstractContextManager[Recorder], recorder: Recorder, pid: int) -> None:
    """Close the trace at the end of the process; one without a step is removed, for there was no training here."""
    if os.getpid() != pid:
        return
    died_of: BaseException | None = getattr(sys, "last_value", None)
    try:
        context.__exit__(type(died_of) if died_of else None, died_of, None)
    except NothingRecorded:
        recorder.path.unlink(missing_ok=True)
    except TraceError as error:
        _say(error.line())
    except BaseException as error:  # noqa: BLE001 - what the program died of comes back out of the block
        if error is not died_of:
            _say(f"{type(error).__name__}: {error}")


def _say(line: str) -> None:
    print(f"trace: {line}", file=sys.stderr, flush=True)
