"""The rows of an open trace: what each holds, and its tensors, read and verified when they are asked for.

A `Layout` is a list of records that rows share, a `RowView` one row of it.  Invariant: nothing damaged is returned; a digest
or a seal that does not fit raises Damaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import xxhash
from h5py import h5d

from tracer import schema
from tracer.dtypes import DTYPES
from tracer.errors import Damaged
from tracer.opening import RERECORD, damage
from tracer.schema import WHOLE_STEP, IndexEntry, Phase, State
from tracer.tables import layout_attributes, read_index

if TYPE_CHECKING:
    from tracer.built import Drift
    from tracer.reader import Trace

# An enum's own look-up takes longer than everything else that is asked of a record.
_STATES: Final = {int(state): state for state in State}
_PHASES: Final = {phase.label: phase for phase in Phase}


class Layout:
    """A fixed list of records that rows share."""

    def __init__(self, trace: Trace, phase: Phase, group: Any) -> None:
        self.trace = trace
        self.phase = phase
        self.group = group
        self.digest, self.records = layout_attributes(group)
        self._datasets: dict[str, Any] = {}
        self._places: dict[tuple[str, int], tuple[int, int]] = {}

    @cached_property
    def entries(self) -> tuple[IndexEntry, ...]:
        """The index; verified against the layout's digest."""
        with damage(self.trace.path, f"an index of {self.phase.label} cannot be read"):
            texts = read_index(self.group, self.trace.size)
            entries = tuple(map(IndexEntry.from_text, texts))
            if len(entries) != self.records or schema.index_digest(self.phase, texts) != self.digest:
                raise Damaged(
                    f"{self.trace.path} is damaged: an index of {self.phase.label} does not match its digest", RERECORD
                )
        return entries

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Canonical name -> position in the index."""
        return {entry.name: i for i, entry in enumerate(self.entries)}

    def read_row(self, name: str, row: int, dtype: npt.DTypeLike, start: int, count: int) -> npt.NDArray[Any]:
        """`count` elements of one row of a dataset of this layout, from element `start` on."""
        kind = np.dtype(dtype)
        if count == 0:
            return np.zeros(0, kind)
        offset, size = self._places.get((name, row)) or self._place(name, row)
        width = kind.itemsize
        if (start + count) * width > size:
            raise Damaged(
                f"{self.trace.path} is damaged: {self.phase.label}/{name} is shorter than its index", RERECORD
            )
        return np.frombuffer(self.trace.pread(offset + start * width, count * width), kind)

    def _place(self, name: str, row: int) -> tuple[int, int]:
        """Where a row of a dataset is in the file: byte offset and size.  Remembered, as HDF5 takes its time to say."""
        with damage(self.trace.path, f"{self.phase.label} cannot be read"):
            dataset = self._datasets.get(name)
            if dataset is None:
                dataset = self._datasets[name] = h5d.open(self.group.id, name.encode())
            shape = dataset.shape[1:]
            chunk = dataset.get_chunk_info_by_coord((row, *(0 for _ in shape)))
            if chunk.byte_offset is None or chunk.size != math.prod(shape) * dataset.get_type().get_size():
                raise Damaged(
                    f"{self.trace.path} is damaged: a row of {self.group.name}/{name} is not where it should be",
                    RERECORD,
                )
            place = self._places[name, row] = (int(chunk.byte_offset), int(chunk.size))
        return place


class RowView:
    """The records of one phase at one step (and micro-batch)."""

    def __init__(self, layout: Layout, position: int, step: int, micro_batch: int, seal: bytes) -> None:
        self.layout = layout
        self.phase = layout.phase
        self.step = step
        self.micro_batch = micro_batch
        self.seal = seal
        # Records that ranks hold differently; in one file there are none.
        self.drifts: tuple[Drift, ...] = ()
        self._position = position

    @cached_property
    def _sealed(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.void]]:
        n = self.layout.records
        states = self.layout.read_row(schema.STATE, self._position, np.uint8, 0, n)
        digests = self.layout.read_row(schema.DIGEST, self._position, f"V{schema.DIGEST_BYTES}", 0, n)
        seal = schema.row_seal(
            self.layout.digest, self.phase, self.step, self.micro_batch, states.tobytes(), digests.tobytes()
        )
        if seal != self.seal:
            raise Damaged(
                f"{self.layout.trace.path} is damaged: the digests of {self.address()} do not match their seal",
                RERECORD,
            )
        return states, digests

    @property
    def states(self) -> npt.NDArray[np.uint8]:
        """State of each record, uint8[n]; verified against the row's seal."""
        return self._sealed[0]

    @property
    def digests(self) -> npt.NDArray[np.void]:
        """Digest of each record, V16[n]; verified against the row's seal."""
        return self._sealed[1]

    @cached_property
    def stats(self) -> npt.NDArray[np.float64]:
        """STATS of each record, float64[n, 7].  `trace check` verifies them."""
        n, width = self.layout.records, len(schema.STATS)
        if schema.STATS_TABLE in self.layout.group:
            flat = self.layout.read_row(schema.STATS_TABLE, self._position, np.float64, 0, n * width)
            return flat.reshape(n, width)
        stats = np.zeros((n, width))
        for i in range(n):
            row, position = self.target(i)
            stats[i] = row.stats[position]
        return stats

    def state(self, i: int) -> State:
        """State of record `i`."""
        state = _STATES.get(self.states.item(i))
        if state is None:
            raise Damaged(f"{self.layout.trace.path} is damaged: unknown state at {self.address()}")
        return state

    def digest(self, i: int) -> bytes:
        """Digest of record `i`, 16 bytes."""
        return bytes(self.digests.item(i))

    def stored(self, i: int) -> bool:
        """Whether the file holds the tensor of record `i`, here or where its alias points."""
        entry = self.layout.entries[i]
        if entry.alias_of:
            row, position = self.target(i)
            return row.stored(position)
        return entry.stored

    def exact_digest(self, i: int) -> bool:  # noqa: ARG002 - a row that ranks hold parts of answers by record
        """Whether the digest of record `i` is that of its tensor."""
        return True

    def read(self, i: int) -> npt.NDArray[Any]:
        """Tensor of record `i`: stored dtype (bfloat16 as uint16 bits), canonical shape, read-only.

        Follows an alias.  Verified against its digest: raises Damaged.  Raises ValueError if the file holds no data
        for it (see `stored`).
        """
        entry = self.layout.entries[i]
        if entry.alias_of:
            row, position = self.target(i)
            return row.read(position)
        if not entry.stored:
            raise ValueError(f"{entry.name} is in {self.layout.trace.path} as digest and statistics only")
        count = math.prod(entry.shape)
        values = self.layout.read_row(entry.dataset, self._position, DTYPES[entry.dtype], entry.offset, count)
        held = self.state(i) in (State.VALUE, State.ZERO)
        if held and xxhash.xxh3_128_digest(values.view(np.uint8).data) != self.digest(i):
            raise Damaged(
                f"{self.layout.trace.path} is damaged: {entry.name} at {self.address()} does not match its digest",
                RERECORD,
            )
        return values.reshape(entry.shape)

    def sketched(self, i: int) -> bool:
        """Whether the file holds a sketch of record `i` instead of its tensor, here or where its alias points."""
        entry = self.layout.entries[i]
        if entry.alias_of:
            row, position = self.target(i)
            return row.sketched(position)
        return entry.sketched

    def read_sketch(self, i: int) -> npt.NDArray[np.float32]:
        """Sketch of record `i`, float32[61]; raises ValueError if the file holds none (see `sketched`)."""
        entry = self.layout.entries[i]
        if entry.alias_of:
            row, position = self.target(i)
            return row.read_sketch(position)
        if not entry.sketched:
            raise ValueError(f"{entry.name} has no sketch in {self.layout.trace.path}")
        return self._sketches[entry.offset : entry.offset + schema.SKETCH_BUCKETS]

    @cached_property
    def _sketches(self) -> npt.NDArray[np.float32]:
        layout, width = self.layout, schema.SKETCH_BUCKETS * sum(entry.sketched for entry in self.layout.entries)
        sketches = layout.read_row(schema.SKETCH, self._position, "<f4", 0, width)
        digest = layout.read_row(schema.SKETCH_DIGEST, self._position, f"V{schema.DIGEST_BYTES}", 0, 1)
        if digest[0].tobytes() != schema.sketch_digest(sketches.tobytes(), self.stats.tobytes()):
            raise Damaged(
                f"{layout.trace.path} is damaged: sketches of {self.address()} do not match their digest", RERECORD
            )
        return sketches

    def address(self) -> str:
        """`step 3, grad` or `step 3, loss, micro-batch 1`."""
        micro = "" if self.micro_batch == WHOLE_STEP else f", micro-batch {self.micro_batch}"
        return f"step {self.step}, {self.phase.label}{micro}"

    def target(self, i: int) -> tuple[RowView, int]:
        """Row and position that the alias record `i` points to; raises Damaged if there is no such record."""
        entry = self.layout.entries[i]
        label, _, name = entry.alias_of.partition("/")
        trace, phase = self.layout.trace, _PHASES.get(label)
        row = None if phase is None else trace.row(phase, self.step, self.micro_batch)
        position = None if row is None else row.layout.positions.get(name)
        if row is None or position is None:
            raise Damaged(f"{trace.path} is damaged: the reference {entry.alias_of!r} leads nowhere", RERECORD)
        return row, position
