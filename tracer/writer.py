"""Write a trace: rows in, one HDF5 file out, one committed step at a time.

A step's rows go to disk, into space that HDF5 has set aside, and only then the 8-byte counter says that the step exists.
HDF5's own metadata changes only when the file grows, and reaches the disk in an order in which the file is whole after
every write (tracer/ordered.py).  Space is reserved before HDF5 touches the file, so that a full disk is met while the file
is whole.  This module is handed numpy arrays only and knows no framework.

Measured (`python -m tests.bench.writing`): one dataset per tensor costs several times as much as packed rows.  The default
file version reopens after SIGKILL; `libver="latest"` does not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from tracer import schema
from tracer._version import DISTRIBUTION, VERSION
from tracer.dtypes import DTYPES
from tracer.errors import BadUsage, NoPermission, NotFound, RecordingStopped
from tracer.hdf5 import TABLE_CHUNK, bytes_per_row, row_dataset, table_dataset, write_index
from tracer.ordered import RESERVE_BYTES, OrderedFile
from tracer.packing import Written, copy_aliased, index_entry, measure, pack_plan
from tracer.schema import Phase, Row

# Rows of a layout are allocated a few at a time; one allocation is at most this large.
GROWTH_ROWS: Final = 16
GROWTH_BYTES: Final = 64 * 2**20
# The end document is allocated at the start, so that it can be written on a full disk.
END_BYTES: Final = 1024


class TraceWriter:
    """One trace being written.

    `write_step` commits a step; `finish` closes the file.  Without `finish` the file stays readable up to the last
    committed step.  Raises BadUsage if the file exists and `overwrite` is false, NotFound or NoPermission if it cannot be
    created, RecordingStopped when it cannot be written any further.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        env: Mapping[str, Any],
        declared: Mapping[str, Any],
        overwrite: bool = False,
        durable: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.commits = 0
        self._max_bytes = max_bytes
        self._layouts: dict[tuple[Any, ...], _LayoutWriter] = {}  # by group, phase and records
        self._last_step = -1
        self._rewritten: set[int] = set()
        self._last_eval = -1
        self._seal = b""
        self._disk = OrderedFile(self.path, _create(self.path, overwrite), durable=durable)
        try:
            self._disk.require(RESERVE_BYTES)
            self._file = h5py.File(self._disk, "w")
            self._file.attrs["format"] = schema.FORMAT
            self._file.attrs["tool"] = f"{DISTRIBUTION} {VERSION}"
            committed = self._file.create_dataset(schema.COMMITTED, data=np.zeros(1, np.int64))
            self._step_table = _Table(self._file, schema.STEPS, schema.STEP_DTYPE, self._disk)
            text = np.bytes_(schema.RUNNING.ljust(END_BYTES))
            self._end = self._file.create_dataset(f"{schema.META}/end", data=text)
            self._end.attrs["digest"] = np.void(_text_digest(text))
            self._settle()
            self._committed_at = int(committed.id.get_offset())
        except (OSError, RuntimeError) as error:
            self._disk.close()
            raise RecordingStopped(f"cannot write {self.path.name}: {_reason(error)}") from error
        self._documents: dict[str, Mapping[str, Any]] = {"env": env, "declared": declared}

    def document(self, name: str, content: Mapping[str, Any]) -> None:
        """Set a document (`env`, `declared`, `observed`); it is written with the next step, once."""
        self._documents[name] = content

    def write_step(self, step: int, rows: Sequence[Row], observed: Mapping[str, Any] | None = None) -> None:
        """Write and commit one step.  Steps must come in increasing order; `eval` rows may follow their step."""
        evals = [row for row in rows if row.phase is Phase.EVAL]
        others = [row for row in rows if row.phase is not Phase.EVAL]
        if others or not evals:
            if step <= self._last_step:
                raise BadUsage(f"step {step} was written after step {self._last_step}")
            self._write(step, others, observed)
        if evals:
            if step != self._last_step or step == self._last_eval:
                raise BadUsage(f"eval rows of step {step} were written twice, or not after that step")
            self._write(step, evals, None)
            self._last_eval = step

    def rewrite_step(self, step: int, rows: Sequence[Row]) -> None:
        """Commit rows of an earlier step again; readers take them in place of the first ones.

        For steps that were written thinned and turn out to matter.  Once a step; `eval` rows stay as they are.
        """
        if not 0 < step <= self._last_step or step in self._rewritten or any(row.phase is Phase.EVAL for row in rows):
            raise BadUsage(f"step {step} cannot be written again")
        self._write(-step, rows, None)
        self._rewritten.add(step)

    @property
    def last_step(self) -> int:
        """Number of the last committed step, -1 before the first."""
        return self._last_step

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._disk.size

    def _write(self, commit: int, rows: Sequence[Row], observed: Mapping[str, Any] | None) -> None:
        """Commit rows of a step; `-step` for rows that take the place of earlier ones."""
        step = abs(commit)
        if observed is not None:
            self.document("observed", observed)
        try:
            done: dict[tuple[str, int], Written] = {}
            place = f"{schema.AGAIN}/" if commit < 0 else ""
            seals = [self._write_row(row, done, place) for row in sorted(rows, key=_row_order)]
            self._commit(commit, seals)
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise RecordingStopped(f"cannot write {self.path.name} at step {step}: {_reason(error)}") from error

    def finish(self, *, finished: bool = True, reason: str = "") -> None:
        """Write the end document and close.  Safe to call twice; never raises for a full disk."""
        if not self._file.id.valid:
            return
        try:
            text = _end_document(finished, reason, self.commits)
            # The digest first: until the text follows, the old one counts as unfinished whatever its digest.
            self._end.attrs.modify("digest", np.void(_text_digest(text)))
            self._settle()
            self._disk.put(int(self._end.id.get_offset()), text)
            self._file.close()
            self._disk.settle()
            self._disk.sync()
        except (OSError, RuntimeError):
            # The steps are committed; a file without an end counts as unfinished, which is what it is.
            with contextlib.suppress(OSError, RuntimeError):
                self._file.close()
        finally:
            self._disk.close()

    def _write_row(self, row: Row, done: dict[tuple[str, int], Written], place: str) -> bytes:
        key = (
            place,
            row.phase,
            tuple((r.name, r.dtype, r.shape, r.alias_of, r.stored, r.sketched) for r in row.records),
        )
        layout = self._layouts.get(key)
        if layout is None:
            self._disk.require(RESERVE_BYTES)
            number = sum(1 for where, phase, _ in self._layouts if (where, phase) == (place, row.phase))
            group = self._file.create_group(f"{place}{row.phase.label}/{number}")
            layout = self._layouts[key] = _LayoutWriter(group, row, self._disk, self._max_bytes)
        if layout.full:
            layout.grow()
            self._settle()
        return layout.write(row, done)

    def _commit(self, commit: int, seals: Sequence[bytes]) -> None:
        if self._documents or self._step_table.full:
            for name in sorted(self._documents):
                self._write_document(name, self._documents.pop(name))
            if self._step_table.full:
                self._step_table.grow()
            self._settle()
        self._seal = schema.step_seal(self._seal, commit, seals)
        self._step_table.append((commit, len(seals), np.void(self._seal)))
        self._disk.sync()
        self.commits += 1
        self._last_step = max(self._last_step, commit)
        self._disk.put(self._committed_at, np.array([self.commits], "<i8"))
        self._disk.sync()

    def _write_document(self, name: str, content: Mapping[str, Any]) -> None:
        path = f"{schema.META}/{name}"
        if path in self._file:
            return
        text = np.bytes_(json.dumps(content, sort_keys=True, default=str).encode())
        self._file.create_dataset(path, data=text).attrs["digest"] = np.void(_text_digest(text))

    def _settle(self) -> None:
        """After HDF5's metadata has changed: bring it to disk."""
        self._file.flush()
        self._disk.settle()


class _Table:
    """A 1-D table of a structured dtype that grows a chunk at a time; HDF5 sets the space aside, entries are put there."""

    def __init__(self, group: Any, name: str, dtype: Any, disk: OrderedFile) -> None:
        self._dtype = np.dtype(dtype)
        self._data = table_dataset(group, name, self._dtype)
        self._disk = disk
        self._length = 0
        self._allocated = 0
        self._chunk_at = 0

    @property
    def full(self) -> bool:
        """Whether the next entry needs `grow` first."""
        return self._length == self._allocated

    def grow(self) -> None:
        """Allocate one more chunk."""
        self._allocated += TABLE_CHUNK
        self._data.resize((self._allocated,))
        self._chunk_at = int(self._data.id.get_chunk_info_by_coord((self._length,)).byte_offset)

    def append(self, entry: tuple[Any, ...]) -> None:
        """Put the next entry."""
        place = self._chunk_at + self._length % TABLE_CHUNK * self._dtype.itemsize
        self._disk.put(place, np.array([entry], self._dtype).view(np.uint8))
        self._length += 1


class _LayoutWriter:
    """The rows of one fixed list of records: `/phase/k` in the file."""

    def __init__(self, group: Any, row: Row, disk: OrderedFile, max_bytes: int | None) -> None:
        self._group = group
        self._disk = disk
        self._max_bytes = max_bytes
        self._slots, widths = pack_plan(row.records)
        self._widths = widths
        self._positions = {record.name: i for i, record in enumerate(row.records)}
        if len(self._positions) != len(row.records):
            raise ValueError(f"two records of {row.phase.label} have the same name")
        entries = [index_entry(record, slot) for record, slot in zip(row.records, self._slots, strict=True)]
        self._digest = schema.layout_digest(row.phase, entries)
        group.attrs["digest"] = np.void(self._digest)
        group.attrs["records"] = len(entries)
        write_index(group, entries)
        self._table = _Table(group, schema.ROWS, schema.ROW_DTYPE, disk)
        n = len(entries)
        # Rows that only refer to others have their statistics there.
        self._has_stats = any(not record.alias_of for record in row.records)
        self._datasets = {
            schema.DIGEST: row_dataset(group, schema.DIGEST, np.dtype(f"V{schema.DIGEST_BYTES}"), (n,)),
            schema.STATE: row_dataset(group, schema.STATE, np.dtype("u1"), (n,)),
        }
        if self._has_stats:
            self._datasets[schema.STATS_TABLE] = row_dataset(
                group, schema.STATS_TABLE, np.dtype("<f8"), (n, len(schema.STATS))
            )
        if schema.SKETCH in widths:
            digest = np.dtype(f"V{schema.DIGEST_BYTES}")
            self._datasets[schema.SKETCH_DIGEST] = row_dataset(group, schema.SKETCH_DIGEST, digest, (1,))
        for name, (dtype, width) in widths.items():
            self._datasets[name] = row_dataset(group, name, dtype, (width,))
        self._row_bytes = sum(bytes_per_row(dataset) for dataset in self._datasets.values())
        self._rows = 0
        self._allocated = 0

    @property
    def full(self) -> bool:
        """Whether the next row needs `grow` first."""
        return self._rows == self._allocated or self._table.full

    def write(self, row: Row, done: dict[tuple[str, int], Written]) -> bytes:
        """Write one row and add it to `done`, the rows of this step that aliases can point to; returns its seal."""
        packed = {name: np.zeros(width, DTYPES[dtype]) for name, (dtype, width) in self._widths.items()}
        tables = measure(row.records, self._slots, packed)
        done[row.phase.label, row.micro_batch] = (self._positions, tables)
        copy_aliased(row, tables, done)
        for name, values in packed.items():
            self._put(name, values)
        self._put(schema.DIGEST, tables.digest)
        self._put(schema.STATE, tables.state)
        if self._has_stats:
            self._put(schema.STATS_TABLE, tables.stats)
        if schema.SKETCH in packed:
            digest = schema.sketch_digest(packed[schema.SKETCH].tobytes(), tables.stats.tobytes())
            self._put(schema.SKETCH_DIGEST, np.array([digest], f"V{schema.DIGEST_BYTES}"))
        seal = schema.row_seal(
            self._digest, row.phase, row.step, row.micro_batch, tables.state.tobytes(), tables.digest.tobytes()
        )
        self._table.append((row.step, row.micro_batch, np.void(seal)))
        self._rows += 1
        return seal

    def grow(self) -> None:
        """Allocate more rows: doubling at first, then a bounded number of rows and bytes at a time."""
        if self._table.full:
            self._table.grow()
        if self._rows < self._allocated:
            return
        more = max(1, min(self._allocated, GROWTH_ROWS, GROWTH_BYTES // max(1, self._row_bytes)))
        if self._max_bytes is not None and self._disk.size + more * self._row_bytes > self._max_bytes / 2:
            more = 1  # room that is set aside here could not be used by another layout
        self._disk.require(more * self._row_bytes)
        self._allocated += more
        for dataset in self._datasets.values():
            dataset.resize(self._allocated, axis=0)

    def _put(self, name: str, values: npt.NDArray[Any]) -> None:
        dataset = self._datasets[name]
        if values.size:
            with self._disk.direct():
                dataset.id.write_direct_chunk((self._rows, *(0 for _ in dataset.shape[1:])), values)


def _row_order(row: Row) -> tuple[int, int]:
    return row.phase, row.micro_batch


def _end_document(finished: bool, reason: str, commits: int) -> np.bytes_:
    """The end document, padded with blanks to the room that was set aside for it."""
    text = json.dumps({"finished": finished, "reason": reason[: END_BYTES // 2], "commits": commits}, sort_keys=True)
    return np.bytes_(text.encode().ljust(END_BYTES))


def _text_digest(text: bytes) -> bytes:
    return xxhash.xxh3_128_digest(text)


def _reason(error: BaseException) -> str:
    """What the operating system said, without HDF5's stack around it."""
    number = getattr(error, "errno", None)
    if number:
        return os.strerror(number)
    found = re.search(r"error message = '([^']+)'", str(error))
    return found.group(1) if found else str(error)


def _create(path: Path, overwrite: bool) -> int:
    """A descriptor of the new, empty file, locked against a second writer.  HDF5's own errors here are a page long."""
    if path.is_dir():
        raise BadUsage(f"{path} is a folder", "give the name of a file")
    if path.exists() and not overwrite:
        raise BadUsage(f"{path} exists already", "choose another name, or --force to replace it")
    if not path.parent.is_dir():
        raise NotFound(f"the folder {path.parent} does not exist", "create it first")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError as error:
        raise NoPermission(f"{path} may not be written", "choose a folder of yours, or mend its permissions") from error
    except OSError as error:
        raise RecordingStopped(f"cannot create {path}: {_reason(error)}") from error
    try:
        _lock(path, fd)
        os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(path: Path, fd: int) -> None:
    """Keep others from writing the same file; a file system that knows no locks has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadUsage(
            f"{path} is being written by another run", "choose another name, or end that run first"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise RecordingStopped(f"cannot lock {path}: {_reason(error)}") from error
