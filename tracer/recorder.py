"""Collect what the backends see of a live run and hand whole steps to a writer thread.

Backends add records to the current step; `end_step` puts the step into a queue, and a thread that knows numpy arrays only
writes it.  Invariants: nothing that goes wrong in here reaches the run (recording stops, with one line on stderr,
and the run goes on), and nothing in here draws a random number or touches an array of the run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.errors import BadUsage, NothingRecorded, TraceError
from tracer.handover import Step, WriterThread, held_by
from tracer.names import NameMap, Rule, is_usual_module
from tracer.perturb import Perturbation
from tracer.place import place
from tracer.schema import POSITIONS, WHOLE_STEP, Phase, Record, Row, State
from tracer.size import estimate
from tracer.thinning import LongRun
from tracer.writer import TraceWriter

# Why a trace ends that was ended by Ctrl-C.
INTERRUPTED: Final = "interrupted"

# Positions of a micro-batch whose module outputs are kept, unless --forward-rows says otherwise.
FORWARD_ROWS: Final = 64

# Recorded unless --what says otherwise; `forward` costs as much as the model and is asked for by name.
DEFAULT_PHASES: Final = frozenset(phase for phase in Phase if phase is not Phase.FORWARD)


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What to record, and how.

    `what`: phases.  `steps`: first and last step, inclusive; step 0 is always recorded.  `only`, `omit`: globs over
    canonical names.  `names`: renaming rules that come before the built-in ones.  `durable`: fsync every step.
    `modules`: globs over canonical module names, for phase `forward` (none: all of the usual kinds).  `forward_rows`: positions
    of a micro-batch whose outputs are kept.  `micro_grads`, `token_loss`: also the gradient of each micro-batch, and the
    loss of each token.
    `long`: which steps of a long run keep their tensors.  `announce`: say on stderr, before the first step, what the trace will
    take.
    `twin`: what makes this run the twin of another; without it nothing of the run is ever changed.
    """

    what: frozenset[Phase] = DEFAULT_PHASES
    steps: tuple[int, int] | None = None
    only: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    names: tuple[Rule, ...] = ()
    declared: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    durable: bool = False
    twin: Perturbation | None = None
    modules: tuple[str, ...] = ()
    forward_rows: int = FORWARD_ROWS
    micro_grads: bool = False
    token_loss: bool = False
    long: LongRun = field(default_factory=LongRun)
    announce: bool = False


class Recorder:
    """The recording of one run.  Backends call it on the training thread."""

    def __init__(self, path: str | os.PathLike[str], options: RecordOptions | None = None) -> None:
        self.options = options or RecordOptions()
        self.path = Path(path)
        self.names = NameMap(self.options.names)
        self.step = 0
        self.failure = ""
        self._cut_off = ""
        self._explanation = (
            "the program ended without an optimizer step that could be seen",
            "a step compiled before recording began, or run in another process, cannot be recorded",
        )
        self._pid = os.getpid()
        self._rows: dict[tuple[Phase, int], list[Record]] = {}
        self._logged: dict[str, Record] = {}
        self._last_put = -1
        self._observed: dict[str, Any] = {} if self.options.twin is None else self.options.twin.facts()
        self._declared: dict[str, Any] = dict(self.options.declared)
        options = self.options
        self._writer = WriterThread(
            TraceWriter(
                path, env={}, declared={}, overwrite=options.overwrite, durable=options.durable,
                max_bytes=options.long.max_bytes,
            ),
            options.long,
        )  # fmt: skip
        self._closed = False

    @property
    def active(self) -> bool:
        """Whether what is added is still being recorded (in this process, not in a fork of it)."""
        return not self._closed and not self.failure and os.getpid() == self._pid

    @property
    def steps_recorded(self) -> int:
        """Optimizer steps handed over so far, without step 0."""
        first = self.options.steps[0] if self.options.steps is not None else 1
        return max(0, self._last_put - max(first, 1) + 1)

    def wants(self, phase: Phase) -> bool:
        """Whether records of this phase are wanted at the current step; ask before copying anything."""
        return self.active and phase in self.options.what and self._wants_step()

    def wants_module(self, name: str) -> bool:
        """Whether the output of the module of this canonical name belongs into phase `forward`."""
        globs = self.options.modules
        asked = any(fnmatch.fnmatchcase(name, glob) for glob in globs) if globs else is_usual_module(name)
        return asked and self._wants_name(name)

    def declare(self, settings: Mapping[str, Any]) -> None:
        """Add declared settings, by dotted key."""
        self._declared.update(settings)

    def observe(self, key: str, value: Any) -> None:
        """Note a setting found in a live object (JSON-able).  The first value for a key is kept."""
        self._observed.setdefault(key, value)

    def add(self, phase: Phase, records: Iterable[Record], micro_batch: int = WHOLE_STEP) -> None:
        """Add records to the current step.  Their arrays must not change any more."""
        if self.wants(phase):
            # Rows of `forward` say nothing without their positions.
            kept = [
                record
                for record in records
                if self._wants_name(record.name) or (phase is Phase.FORWARD and record.name == POSITIONS)
            ]
            if self.options.only or self.options.omit:
                kept = [_without_the_rest(record) for record in kept]
            self._rows.setdefault((phase, micro_batch), []).extend(kept)

    def log(self, name: str, value: Any) -> None:
        """Record a named value (number or array) in the `eval` phase of the last step that is complete.

        The same name again replaces the value.  What is not a number is refused with a line on stderr, and recording goes on.
        """
        try:
            array = np.asarray(value)
        except Exception:  # noqa: BLE001 - a tensor on a device, or with a gradient, raises what its framework likes
            array = np.asarray(None)
        if array.dtype.kind not in "fiub":
            kind = type(value).__name__ if array.dtype.kind == "O" else array.dtype
            print(f"trace: {name!r} is not recorded: numbers are, {kind} is not", file=sys.stderr, flush=True)
            return
        if self.active and Phase.EVAL in self.options.what and self._wants_name(name):
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
            self._logged[name] = make_record(self.names, name, array, str(array.dtype))

    def end_step(self) -> None:
        """Hand the current step to the writer; the first call ends step 0, the state before training."""
        self._flush_logged()
        rows = self._rows
        self._rows = {}
        if self.step == 0 and self.options.announce and self.active:
            self._announce(rows)
        if self.active and self._wants_step():
            observed = dict(self._observed) if self.step else None
            self._writer.put(Step(self.step, _rows(self.step, rows), dict(self._declared), observed))
            self._last_put = self.step
            if self._writer.failure:
                self._fail(self._writer.failure)
        self.step += 1

    def _announce(self, rows: Mapping[tuple[Phase, int], list[Record]]) -> None:
        start = rows.get((Phase.INIT, WHOLE_STEP), [])
        size = estimate(start, self.options.what, self.options.steps, self._declared, self._observed)
        said = size.sentence(self.options.long.full_steps)
        print(f"trace: recording {self.path.name}: {said}", file=sys.stderr, flush=True)

    def _flush_logged(self) -> None:
        """Hand over what was logged since the last step; before step 0 is complete it waits."""
        if self._logged and self._last_put >= 0 and self.active:
            row = Row(Phase.EVAL, self._last_put, WHOLE_STEP, tuple(self._logged.values()))
            self._writer.put(Step(self._last_put, [row], {}, None))
            self._logged = {}

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Code of ours inside a run of somebody else's: an exception stops the recording, never the run."""
        if not self.active:
            # Still run the body: hooks decide for themselves; whatever fails now is of no interest.
            with contextlib.suppress(Exception):
                yield
            return
        try:
            yield
        except TraceError as error:
            self._fail(error.line())
        except Exception as error:  # noqa: BLE001 - whatever it is, the run must go on
            if os.environ.get("STEPTRACE_DEBUG"):
                import traceback

                traceback.print_exc()
            self._fail(f"{type(error).__name__}: {error}")

    def stop(self, reason: str) -> None:
        """Stop recording; the run goes on and the file keeps what it has."""
        self._fail(reason)

    def cut_off(self, reason: str) -> None:
        """Note that the run did not end well: once closed, the file says that it is unfinished, and why."""
        self._cut_off = reason

    def explain(self, seen: str, hint: str) -> None:
        """Say what was seen of a run in which no step could be recorded, and what to do."""
        self._explanation = seen, hint

    def close(self, error: BaseException | None = None) -> None:
        """Finish the file.  Raises NothingRecorded if the run made no optimizer step; safe to call twice.

        `error`: what the run ended with; the file then says that it is unfinished.
        """
        if self._closed or os.getpid() != self._pid:
            return
        reason = self._cut_off if error is None else _why(error)
        self._flush_logged()
        self._closed = True
        failure = self._writer.close(self.failure or reason)
        self._last_put = min(self._last_put, self._writer.last_step)
        if self._writer.last_step < 0:
            self.path.unlink(missing_ok=True)  # nothing is in it, and it would be in the way of the next try
        if failure and not self.failure:
            self._fail(failure)
        if not self.steps_recorded and not self.failure and error is None and reason != INTERRUPTED:
            seen, hint = self._explanation
            raise NothingRecorded(f"{self.path.name}: {seen}", hint)

    def _wants_step(self) -> bool:
        steps = self.options.steps
        return self.step == 0 or steps is None or steps[0] <= self.step <= steps[1]

    def _wants_name(self, name: str) -> bool:
        only, omit = self.options.only, self.options.omit
        if not only and not omit:
            return True
        if only and not any(fnmatch.fnmatchcase(name, glob) for glob in only):
            return False
        return not any(fnmatch.fnmatchcase(name, glob) for glob in omit)

    def _fail(self, reason: str) -> None:
        if not self.failure:
            self.failure = reason
            print(
                f"trace: recording stopped at step {self.step}: {reason}; the run goes on, "
                f"the steps before are kept in {self.path.name}",
                file=sys.stderr,
                flush=True,
            )


def _why(error: BaseException) -> str:
    """Why a run ended that left the recording by an exception."""
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"the run ended with {type(error).__name__}"


def make_record(names: NameMap, original: str, array: npt.NDArray[Any] | None, dtype: str, **fields: Any) -> Record:
    """A record under its canonical name, the array seen in canonical layout (a view, not a copy).

    `array`: the run's own layout, bfloat16 as uint16 bits; None with `shape=` (the run's own) for a record without data.
    """
    canonical = names(original)
    shape = tuple(fields.pop("shape", () if array is None else array.shape))
    if canonical.transform and len(shape) > 1:
        shape = (*shape[:-2], shape[-1], shape[-2])
        array = None if array is None else array.swapaxes(-1, -2)
    transform = canonical.transform if len(shape) > 1 else ""
    return Record(canonical.name, array, dtype, shape, original, transform, **fields)


def _without_the_rest(record: Record) -> Record:
    """A record whose array is no view of a larger one, which it would keep in memory."""
    data = record.data
    if record.stored and isinstance(data, np.ndarray) and held_by(data).nbytes > data.nbytes:
        return replace(record, data=data.copy())
    return record


def _rows(step: int, records: Mapping[tuple[Phase, int], list[Record]]) -> list[Row]:
    """Rows of a step.  A record that refers to one which was not recorded stands for itself, or is `unrecorded`."""
    names = {(phase.label, m): {record.name for record in group} for (phase, m), group in records.items()}

    def is_there(alias_of: str, micro_batch: int) -> bool:
        label, _, name = alias_of.partition("/")
        return name in names.get((label, micro_batch), ())

    rows = []
    for (phase, m), group in records.items():
        kept = tuple(r if not r.alias_of or is_there(r.alias_of, m) else _on_its_own(r) for r in group)
        if kept:
            rows.append(Row(phase, step, m, kept))
    return rows


def _on_its_own(record: Record) -> Record:
    if record.data is None:
        return replace(record, alias_of="", stored=False, state=State.UNRECORDED)
    return replace(record, alias_of="", stored=True)


_current: Recorder | None = None


def current() -> Recorder | None:
    """The recorder that runs in this process, if there is one."""
    return _current


@contextlib.contextmanager
def recording(path: str | os.PathLike[str], **options: Any) -> Iterator[Recorder]:
    """Record what trains inside the block; see `tracer.record`.  Raises BadUsage when one is running already."""
    global _current
    from tracer.backends import Backends

    if _current is not None:
        raise BadUsage(f"{_current.path.name} is being recorded already", "one recording at a time in a process")
    here = place()
    recorder = Recorder(path if here is None else here.file(path), RecordOptions(**options))
    backends = Backends(recorder)
    _current = recorder
    ended_by: BaseException | None = None
    try:
        backends.install()
        yield recorder
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            ended_by = error
        raise
    finally:
        _current = None
        backends.uninstall()
        recorder.close(ended_by)
