"""Long runs: which steps keep their tensors, and which keep fingerprints of them.

Lives in the writer's thread and sees whole steps on their way to the file.  Tensors are kept for the first steps, around
an anomaly, and as long as there is room; every other step keeps digests, statistics and sketches, which the
comparison understands (see tracer/sketch.py).  Settings, batches, losses and counters are always kept.

An anomaly is a loss, or an element of a gradient, that is not finite, or a loss that rises above `spike` times the median
of the losses before it.  One that lasts is one anomaly, at the step where it begins: a run that has turned to nan for good
does not fill the disk.  The steps just before it are held in memory and are written again in full when it happens, so the
file says at any moment all that it says without them.  Invariant: a step is committed when it is over, thinned or not.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import xxhash

from tracer import packing
from tracer.dtypes import DTYPES, is_float, to_float64
from tracer.errors import RecordingStopped
from tracer.schema import (
    DIGEST_BYTES,
    REPORTED_PREFIX,
    SKETCH_BUCKETS,
    STATS,
    Fingerprint,
    Phase,
    Record,
    Row,
    State,
)  # fmt: skip
from tracer.sketch import sketch
from tracer.writer import TraceWriter

# Losses that the next one is measured against; with fewer than FEWEST nothing counts as a spike.
HISTORY: Final = 32
FEWEST: Final = 8
# Shares of `max_bytes` after which steps are thinned: an ordinary one, and one around an anomaly.  The rest is for thinned ones.
ORDINARY: Final = 0.6
ODD: Final = 0.9
# Records up to this size keep their values where the comparison wants them exactly.
KEPT_BYTES: Final = 4096
# Phases whose small records of any dtype keep their values; elsewhere only integers and scalars do.
KEPT_PHASES: Final = (Phase.CONFIG, Phase.HPARAMS, Phase.BATCH, Phase.LOSS, Phase.EVAL)


@dataclass(frozen=True, slots=True)
class LongRun:
    """What to keep of a long run.

    `full_steps`: steps from the first one that keep their tensors; None: all.  `around`: steps before and after an anomaly
    that keep them too.  `spike`: a loss above this many times the median of the last 32 is an anomaly.  `max_bytes`: the size
    that the file may have; None: any.
    """

    full_steps: int | None = None
    around: int = 2
    spike: float = 3.0
    max_bytes: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether no step is ever thinned."""
        return self.full_steps is None and self.max_bytes is None


class Thinner:
    """Writes steps through a TraceWriter, in full or thinned."""

    def __init__(self, writer: TraceWriter, plan: LongRun) -> None:
        self._writer = writer
        self._plan = plan
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._before: deque[tuple[int, list[Row]]] = deque(maxlen=max(0, plan.around))
        self._full_until = math.inf if plan.full_steps is None else plan.full_steps
        self._odd_until = 0
        self._odd_before = False
        self._thinned: set[int] = set()

    def write_step(self, step: int, rows: Sequence[Row], observed: dict[str, Any] | None) -> None:
        """Commit a step.  Raises RecordingStopped when the file is full or has the size that it may have."""
        if step == 0 or self._plan.keeps_all:
            self._writer.write_step(step, rows, observed)
            return
        if all(row.phase is Phase.EVAL for row in rows):
            self._write(step, list(rows), observed, full=step not in self._thinned)
            return
        odd = self._is_anomaly(rows)
        if odd and not self._odd_before:
            self._odd_until = step + self._plan.around
            self._write_again()
        self._odd_before = odd
        full = step <= max(self._full_until, self._odd_until)
        share = ODD if step <= self._odd_until else ORDINARY
        full = full and size_of(rows) <= self._room(share)
        self._write(step, list(rows), observed, full=full)
        if not full:
            self._before.append((step, list(rows)))

    def _write(self, step: int, rows: list[Row], observed: dict[str, Any] | None, *, full: bool) -> None:
        if not full:
            self._thinned.add(step)
            rows = [thin(row) for row in rows]
        limit = self._plan.max_bytes
        if limit is not None and self._writer.size + size_of(rows) > limit:
            raise RecordingStopped(f"the trace has reached --max-size ({limit:,} bytes) before step {step}")
        self._writer.write_step(step, rows, observed)

    def _room(self, share: float) -> float:
        """Bytes that may still be written until this share of the limit is reached."""
        limit = self._plan.max_bytes
        return math.inf if limit is None else share * limit - self._writer.size

    def _write_again(self) -> None:
        """Give the steps before an anomaly their tensors back, where there is room."""
        for step, rows in self._before:
            if size_of(rows) <= self._room(ODD):
                self._writer.rewrite_step(step, [row for row in rows if row.phase is not Phase.EVAL])
        self._before.clear()

    def _is_anomaly(self, rows: Sequence[Row]) -> bool:
        losses = [_number(r) for row in rows if row.phase is Phase.LOSS for r in row.records if _is_loss(r)]
        loss = sum(losses) / len(losses) if losses else None
        odd = loss is not None and not math.isfinite(loss)
        if loss is not None and len(self._losses) >= FEWEST:
            odd = odd or loss > self._plan.spike * statistics.median(self._losses)
        if loss is not None and not odd:
            self._losses.append(loss)
        return odd or any(_has_nonfinite(record) for row in rows if row.phase is Phase.GRAD for record in row.records)


def size_of(rows: Sequence[Row]) -> int:
    """Bytes that rows take in the file: tensors or sketches, digests, states and statistics."""
    table = DIGEST_BYTES + 1 + 8 * len(STATS)
    return sum(table + _payload(record) for row in rows for record in row.records)


def thin(row: Row) -> Row:
    """The same row with fingerprints in place of its large tensors."""
    return replace(row, records=tuple(_thin_record(row.phase, record) for record in row.records))


def keeps_values(phase: Phase, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a record keeps its values in a fingerprint: small, and wanted exactly."""
    size = math.prod(shape)
    if phase is Phase.FORWARD and not is_float(dtype):
        return True  # the positions, without which the outputs cannot be lined up
    if size * DTYPES[dtype].itemsize > KEPT_BYTES:
        return False
    return size == 1 or not is_float(dtype) or phase in KEPT_PHASES


def _thin_record(phase: Phase, record: Record) -> Record:
    if record.data is None or record.alias_of or not record.stored or record.fingerprint is not None:
        return record
    if 0 in record.shape or keeps_values(phase, record.dtype, record.shape):
        return record
    values = np.ascontiguousarray(record.data).reshape(-1)
    stats = packing.statistics(values, record.dtype)
    state = State.ZERO if record.state is State.VALUE and stats[STATS.index("zeros")] == values.size else record.state
    digest = xxhash.xxh3_128_digest(values.view(np.uint8).data)
    kept = Fingerprint(digest, stats, sketch(values, record.dtype))
    return replace(record, data=None, stored=False, state=state, fingerprint=kept)


def _payload(record: Record) -> int:
    if record.sketched:
        return 4 * SKETCH_BUCKETS
    if not record.stored or record.alias_of:
        return 0
    return math.prod(record.shape) * DTYPES[record.dtype].itemsize


def _number(record: Record) -> float:
    assert record.data is not None
    return float(to_float64(np.asarray(record.data), record.dtype).reshape(-1)[0])


def _is_loss(record: Record) -> bool:
    return record.name == "loss" and record.data is not None and record.data.size == 1


def _has_nonfinite(record: Record) -> bool:
    if record.data is None or record.name.startswith(REPORTED_PREFIX) or not is_float(record.dtype):
        return False
    with np.errstate(all="ignore"):
        # One sum tells: it is finite unless an element is not, or it overflows float64.
        return not math.isfinite(float(to_float64(np.asarray(record.data), record.dtype).sum()))
