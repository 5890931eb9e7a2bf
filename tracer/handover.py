"""Whole steps on their way from the training thread to the file: a queue that is bounded in steps and bytes, and its writer.

The run waits where the disk is slower than it: what has been handed over and is not written yet never exceeds HANDED_STEPS
steps and HANDED_BYTES bytes, a step that is larger alone.  Invariants: steps are written in the order in which they came, none
is lost, and the writer's thread touches numpy arrays only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.environment import environment
from tracer.errors import TraceError
from tracer.schema import Row
from tracer.thinning import LongRun, Thinner
from tracer.writer import TraceWriter

# Steps and bytes that may have been handed over without being written.  Some steps hide the moments when the disk is busy; more
# of them hide no more, and on most machines the memory is the model's too.
HANDED_STEPS: Final = 5
HANDED_BYTES: Final = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Step:
    """A whole step: its number, rows, and the settings known when it ended (None: not to be written)."""

    number: int
    rows: list[Row]
    declared: dict[str, Any]
    observed: dict[str, Any] | None


def held_by(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array whose memory an array keeps: that which it is a view of, or itself."""
    return array.base if isinstance(array.base, np.ndarray) else array


def bytes_held(rows: Sequence[Row]) -> int:
    """Bytes of memory that the arrays of rows keep; arrays that share memory keep it once."""
    held: dict[int, int] = {}
    for row in rows:
        for record in row.records:
            # What is still on a device is no array.
            if isinstance(record.data, np.ndarray):
                owner = held_by(record.data)
                held[id(owner)] = owner.nbytes
    return sum(held.values())


class WriterThread:
    """Owns the file.  Takes steps one after the other; after a failure it goes on taking them, and drops them."""

    def __init__(self, writer: TraceWriter, long: LongRun) -> None:
        self.failure = ""
        self._writer = writer
        self._thinner = Thinner(writer, long)
        self._queue: queue.SimpleQueue[tuple[Step, int] | None] = queue.SimpleQueue()
        # What is handed over and not written yet: the step that is being written, and those behind it.
        self._steps = self._bytes = 0
        self._written = threading.Condition()
        # A daemon, so that a run that dies without closing us does not hang; committed steps are safe anyway.
        self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)
        self._thread.start()

    def put(self, step: Step) -> None:
        """Hand a step over; waits until there is room for it, and until step 0 is written.

        Frozen weights are not copied for step 0: they must be read before the run can change one (by unfreezing it, say).
        """
        size = bytes_held(step.rows)
        with self._written:
            self._written.wait_for(lambda: self._has_room(size))
            self._queue.put((step, size))
            self._steps += 1
            self._bytes += size
            if step.number == 0:
                self._written.wait_for(lambda: not self._steps)

    def _has_room(self, size: int) -> bool:
        return not self._steps or (self._steps < HANDED_STEPS and self._bytes + size <= HANDED_BYTES)

    @property
    def last_step(self) -> int:
        """Number of the last step that is in the file."""
        return self._writer.last_step

    def close(self, reason: str) -> str:
        """Write what is queued, finish the file; returns why writing failed, or an empty string."""
        self._queue.put(None)
        self._thread.join()
        failure = self.failure or reason
        self._writer.finish(finished=not failure, reason=failure)
        return self.failure

    def _work(self) -> None:
        # A call for each step, so that nothing refers to a step that is written.
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        handed = self._queue.get()
        if handed is None:
            return False
        step, size = handed
        try:
            if not self.failure:
                self._write(step)
        except TraceError as error:
            self.failure = str(error)
        except Exception as error:  # noqa: BLE001 - a thread has nobody above it
            self.failure = f"{type(error).__name__}: {error}"
        del step, handed
        with self._written:
            self._steps -= 1
            self._bytes -= size
            self._written.notify_all()
        return True

    def _write(self, step: Step) -> None:
        if self._writer.commits == 0:
            self._writer.document("env", environment())
            self._writer.document("declared", step.declared)
        self._thinner.write_step(step.number, step.rows, step.observed)
