"""Read a trace: lazily, one record at a time, verifying whatever is read.

Opening reads the step table and the seals only.  A row's digests and states are checked against its seal when they are
first asked for, an index against its layout's digest, a tensor against its own digest, so no damaged byte is ever
compared.  Tensors are read with `pread` at the place that HDF5 names, so memory is bounded by the largest record.
Imports numpy and h5py only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt
import xxhash

from tracer import schema, tables
from tracer.errors import Damaged, Empty, NewerFormat, NotATrace
from tracer.opening import RERECORD, being_written, check_readable, damage, find_ranks, open_hdf5
from tracer.rows import Layout, RowView
from tracer.schema import WHOLE_STEP, Phase

if TYPE_CHECKING:
    from tracer.built import Drift

__all__ = ["Layout", "RowKey", "RowView", "Trace", "open_trace"]

RowKey = tuple[Phase, int, int]

# Why a trace has no end, by whether it is being written.
_NO_END: Final = {
    True: "it is still being recorded",
    False: "the run was killed",
    None: "it is still being recorded, or was killed",
}


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace; use it as a context manager, or call `close`.

    `path`: a file; or the files of a run's ranks, as their folder, a pattern (`run.rank*.h5`), or the name that the run was
    given (`run.h5`).  Raises NotFound, NoPermission, NotATrace, NewerFormat, Damaged, Empty (no committed step), MissingRank,
    or BadUsage (a folder with several runs).
    """
    ranks = find_ranks(Path(path))
    if ranks is None:
        return Trace(Path(path))
    from tracer.ranks import open_ranks

    return open_ranks(*ranks)


class Trace:
    """One trace, open for reading.  Attributes are those of the file; see `tracer/schema.py`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_readable(path)
        self._fd = os.open(path, os.O_RDONLY)
        self._tensor_bytes = 0
        self._file: Any = None
        try:
            self._size = os.fstat(self._fd).st_size
            self._file = open_hdf5(path, self._fd)
            with damage(path, "its tables cannot be read"):
                self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        attrs = self._file.attrs
        if "format" not in attrs or schema.COMMITTED not in self._file:
            raise NotATrace(f"{self.path} is an HDF5 file, but not a trace", "give a file that `trace record` wrote")
        self.format = int(attrs["format"])
        self.tool = str(attrs["tool"])
        if self.format > schema.FORMAT:
            raise NewerFormat(
                f"{self.path} has format {self.format} (written by {self.tool}); this version reads up to {schema.FORMAT}",
                f"pip install -U '{self.tool.replace(' ', '>=')}'",
            )
        committed = int(self._file[schema.COMMITTED][0])
        if committed == 0:
            raise Empty(f"{self.path} has no committed step", "the run ended before its first step was complete")
        table = tables.read_table(self._file, schema.STEPS, tables.STEPS, self._size)
        if not 0 < committed <= len(table):
            raise Damaged(f"{self.path} is damaged: its counter says {committed} commits", RERECORD)
        table = table[:committed]
        self.steps: tuple[int, ...] = tuple(dict.fromkeys(int(step) for step in table["step"] if step >= 0))
        self._rows: Mapping[RowKey, RowView] = self._find_rows("")
        again = self._find_rows(f"{schema.AGAIN}/") if schema.AGAIN in self._file else {}
        self._verify_seals(table, again)

    def _find_rows(self, place: str) -> dict[RowKey, RowView]:
        committed = set(self.steps)
        rows: dict[RowKey, RowView] = {}
        for phase in Phase:
            for number in self._file.get(f"{place}{phase.label}", ()):
                layout = Layout(self, phase, self._file[f"{place}{phase.label}/{number}"])
                for position, entry in enumerate(tables.read_table(layout.group, schema.ROWS, tables.ROWS, self._size)):
                    step, micro_batch, seal = int(entry["step"]), int(entry["micro_batch"]), entry["seal"].tobytes()
                    if step in committed and any(seal):
                        rows[phase, step, micro_batch] = RowView(layout, position, step, micro_batch, seal)
        return rows

    def _verify_seals(self, table: npt.NDArray[Any], again: Mapping[RowKey, RowView]) -> None:
        # A step is committed without its `eval` rows; those, if there are any, are a commit of their own.  So are rows that
        # were written again.
        seals: dict[tuple[int, bool], list[bytes]] = {}
        for sign, rows in ((1, self._rows), (-1, again)):
            for phase, step, micro_batch in sorted(rows, key=lambda key: (key[0], key[2])):
                key = (sign * step, phase is Phase.EVAL)
                seals.setdefault(key, []).append(rows[phase, step, micro_batch].seal)
        seal, seen = b"", set()
        for entry in table:
            step = int(entry["step"])
            seal = schema.step_seal(seal, step, seals.pop((step, step in seen), []))
            seen.add(step)
            if seal != entry["seal"].tobytes():
                raise Damaged(f"{self.path} is damaged: the seal of step {step} does not fit its rows", RERECORD)
        # An `eval` row, or one that was written again, without its commit was being written when the run was cut off.
        for step, _ in seals:
            self._rows = {key: row for key, row in self._rows.items() if key[:2] != (Phase.EVAL, step)}
        self._rows = {**self._rows, **{key: row for key, row in again.items() if -key[1] in seen}}
        end = self.end
        if end.get("finished") and end.get("commits") != len(table):
            raise Damaged(f"{self.path} is damaged: it ended after {end.get('commits')} commits", RERECORD)

    # What a trace says of itself.

    @cached_property
    def env(self) -> dict[str, Any]:
        """Versions, device, threads, operating system, arguments of the run."""
        return self.document("env")

    @cached_property
    def declared(self) -> dict[str, Any]:
        """Settings as the program declared them, by dotted key."""
        return self.document("declared")

    @cached_property
    def observed(self) -> dict[str, Any]:
        """Settings as the recorder found them in the live objects, by dotted key."""
        return self.document("observed")

    @cached_property
    def end(self) -> dict[str, Any]:
        """How recording ended: `finished`, `reason`, `commits`."""
        try:
            end = self.document("end")
        except Damaged:
            # Killed while it was being written: the steps are whole all the same.
            return {"finished": False, "reason": "the end was not written completely"}
        return {**end, "reason": _NO_END[being_written(self._fd)]} if end == json.loads(schema.RUNNING) else end

    @property
    def finished(self) -> bool:
        """False if the run or the recording was cut off: the steps that are here are whole, the rest is missing."""
        return bool(self.end.get("finished"))

    @property
    def fingerprint(self) -> bool:
        """Whether tensors were replaced by sketches of them, at some steps at least (`trace shrink`, long runs)."""
        return bool(self.sketched_steps)

    @cached_property
    def sketched_steps(self) -> tuple[int, ...]:
        """The steps at which sketches are kept in place of tensors, ascending."""
        with damage(self.path, "its tables cannot be read"):
            layouts = {row.layout for row in self._rows.values()}
            sketched = {layout for layout in layouts if schema.SKETCH in layout.group}
            return tuple(sorted({row.step for row in self._rows.values() if row.layout in sketched}))

    @property
    def last_step(self) -> int:
        """Number of the last committed step."""
        return self.steps[-1]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that have at least one row, in causal order."""
        return tuple(sorted({phase for phase, _, _ in self._rows}))

    @property
    def size(self) -> int:
        """Length of the file in bytes; of ranks, of all their files."""
        return self._size

    @property
    def parts(self) -> tuple[Trace, ...]:
        """The files that this trace is read from: itself, or one a rank."""
        return (self,)

    @property
    def of_ranks(self) -> bool:
        """Whether this is the run of several ranks, put together (`tracer.ranks.RankTrace`)."""
        return self.parts[0] is not self

    def drifts(self) -> Iterator[tuple[RowView, Drift]]:
        """Every record that ranks hold differently and should not, in causal order; nothing in the trace of one process."""
        for row in self.rows():
            for drift in row.drifts:
                yield row, drift

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._tensor_bytes

    def rows(self, phase: Phase | None = None) -> Iterator[RowView]:
        """All rows (of a phase), by step, phase and micro-batch."""
        for key in sorted(self._rows, key=lambda k: (k[1], k[0], k[2])):
            if phase is None or key[0] is phase:
                yield self._rows[key]

    def row(self, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> RowView | None:
        """One row, or None if that phase was not recorded there."""
        return self._rows.get((phase, step, micro_batch))

    def micro_batches(self, phase: Phase, step: int) -> tuple[int, ...]:
        """Micro-batch numbers of the rows of a phase at a step; `(-1,)` for a phase with one row per step."""
        return self._numbers.get((phase, step), ())

    @cached_property
    def _numbers(self) -> dict[tuple[Phase, int], tuple[int, ...]]:
        """Micro-batch numbers of the rows, made once: this is asked at every step."""
        numbers: dict[tuple[Phase, int], list[int]] = {}
        for phase, step, micro_batch in self._rows:
            numbers.setdefault((phase, step), []).append(micro_batch)
        return {key: tuple(sorted(found)) for key, found in numbers.items()}

    def to_dataframe(self) -> Any:
        """One line a record, with its statistics, as a pandas DataFrame; raises PackageMissing without pandas."""
        from tracer.notebook import dataframe

        return dataframe(self)

    def __repr__(self) -> str:
        """`<Trace run.h5: steps 0 to 20, finished>`."""
        if self._file is None:
            return f"<Trace {self.path.name}: closed>"
        return f"<Trace {self.path.name}: steps {self.steps[0]} to {self.last_step}, {'' if self.finished else 'un'}finished>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from tracer.notebook import summary

        return summary(self) if self._file is not None else "<p>a closed trace</p>"

    def close(self) -> None:
        """Close the file.  Safe to call twice."""
        if self._file is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._file.close()
            self._file = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # For RowView and Layout.

    def pread(self, offset: int, count: int) -> bytes:
        """`count` bytes of the file at `offset`; raises Damaged if they are not all there."""
        data = os.pread(self._fd, count, offset)
        while len(data) < count:
            piece = os.pread(self._fd, count - len(data), offset + len(data))
            if not piece:
                raise Damaged(f"{self.path} is damaged: it ends before byte {offset + count}", RERECORD)
            data += piece
        self._tensor_bytes += count
        return data

    def document(self, name: str) -> dict[str, Any]:
        """One of schema.DOCUMENTS, empty if it was not written; raises Damaged if it does not match its digest."""
        with damage(self.path, f"its document {name} cannot be read"):
            dataset = self._file.get(f"{schema.META}/{name}")
            if dataset is None:
                return {}
            text = bytes(dataset[()])
            if name == "end" and text.rstrip() == schema.RUNNING:
                # Killed, perhaps between the digest of the real end and the end itself.
                return dict(json.loads(text))
            if xxhash.xxh3_128_digest(np.bytes_(text)) != dataset.attrs["digest"].tobytes():
                raise Damaged(f"{self.path} is damaged: its document {name} does not match its digest", RERECORD)
            document = json.loads(text)
        if not isinstance(document, dict):
            raise Damaged(f"{self.path} is damaged: its document {name} is not an object", RERECORD)
        return document
