"""Rows that are not in one file as they are shown: put together, record by record, from rows of other traces.

`BuiltRow` is a RowView like any other.  Each of its records has a source, which knows how to make the tensor and says what it can
without making it.  Invariant: what is read from a file is verified there; nothing is kept but digests and statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from tracer import schema
from tracer.dtypes import DTYPES
from tracer.errors import Damaged
from tracer.packing import statistics
from tracer.reader import Layout, RowView
from tracer.schema import IndexEntry, Phase, State, layout_digest
from tracer.shards import Piece, without_piece

if TYPE_CHECKING:
    from tracer.reader import Trace

_L2, _MIN, _MAX, _MEAN, _NAN, _INF, _ZEROS = range(len(schema.STATS))


@dataclass(frozen=True, slots=True)
class Drift:
    """A record that is to be the same on every rank, and is not: `rank` is the first one that has something else."""

    name: str
    rank: int
    first: RowView
    other: RowView


class Source(Protocol):
    """Where one record of a built row comes from."""

    @property
    def entry(self) -> IndexEntry:
        """Its index entry in the built row."""

    @property
    def exact_digest(self) -> bool:
        """Whether the digest is that of the tensor's own bytes."""

    def state(self) -> State:
        """State of the record."""

    def stored(self) -> bool:
        """Whether `read` gives the tensor."""

    def read(self) -> npt.NDArray[Any]:
        """The tensor: stored dtype, canonical shape."""

    def digest(self) -> bytes:
        """16 bytes that are equal for equal tensors."""

    def stats(self) -> npt.NDArray[np.float64]:
        """STATS, float64[7]."""


@dataclass(frozen=True, slots=True)
class Held:
    """A record of another row as it is."""

    row: RowView
    position: int
    exact_digest: bool = True

    @property
    def entry(self) -> IndexEntry:
        """Its index entry in the built row."""
        return self.row.layout.entries[self.position]

    def state(self) -> State:
        """State of the record."""
        return self.row.state(self.position)

    def stored(self) -> bool:
        """Whether `read` gives the tensor."""
        return self.row.stored(self.position)

    def read(self) -> npt.NDArray[Any]:
        """The tensor: stored dtype, canonical shape."""
        return self.row.read(self.position)

    def digest(self) -> bytes:
        """16 bytes that are equal for equal tensors."""
        return bytes(self.row.digests[self.position].tobytes())

    def stats(self) -> npt.NDArray[np.float64]:
        """STATS, float64[7]."""
        values: npt.NDArray[np.float64] = self.row.stats[self.position]
        return values


@dataclass(frozen=True, slots=True)
class Made:
    """A record that is computed: `make` gives the tensor in the entry's dtype and shape."""

    entry: IndexEntry
    make: Callable[[], npt.NDArray[Any]]
    exact_digest: bool = True

    def state(self) -> State:
        """State of the record."""
        return State.VALUE

    def stored(self) -> bool:
        """Whether `read` gives the tensor."""
        return True

    def read(self) -> npt.NDArray[Any]:
        """The tensor: stored dtype, canonical shape."""
        return np.ascontiguousarray(self.make()).astype(DTYPES[self.entry.dtype], copy=False).reshape(self.entry.shape)

    def digest(self) -> bytes:
        """16 bytes that are equal for equal tensors."""
        return _digest(self.read())

    def stats(self) -> npt.NDArray[np.float64]:
        """STATS, float64[7]."""
        return statistics(self.read().reshape(-1), self.entry.dtype)


@dataclass(frozen=True, slots=True)
class Absent:
    """A record that there is, and that cannot be put together."""

    entry: IndexEntry
    exact_digest: bool = False

    def state(self) -> State:
        """State of the record."""
        return State.UNRECORDED

    def stored(self) -> bool:
        """Whether `read` gives the tensor."""
        return False

    def read(self) -> npt.NDArray[Any]:
        """The tensor: stored dtype, canonical shape."""
        raise ValueError(f"{self.entry.name} cannot be put together")

    def digest(self) -> bytes:
        """16 bytes that are equal for equal tensors."""
        return bytes(schema.DIGEST_BYTES)

    def stats(self) -> npt.NDArray[np.float64]:
        """STATS, float64[7]."""
        return np.zeros(len(schema.STATS))


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor of which each part lies in another row.  `parts`: row, position and place; each box once."""

    parts: tuple[tuple[RowView, int, Piece], ...]

    @property
    def entry(self) -> IndexEntry:
        """Its index entry in the built row."""
        row, position, piece = self.parts[0]
        entry = row.layout.entries[position]
        return replace(entry, shape=piece.whole, transform=without_piece(entry.transform))

    @property
    def exact_digest(self) -> bool:
        """Whether the digest is that of the tensor's own bytes."""
        return self.stored()

    def state(self) -> State:
        """State of the record."""
        # A part without elements has no say.
        states = {row.state(i) for row, i, _ in self.parts if 0 not in row.layout.entries[i].shape}
        for state in (State.UNRECORDED, State.NONE, State.VALUE):
            if state in states:
                # A sketch of a part says nothing of the whole; of weights at the start the statistics do.
                frozen = self.parts[0][0].phase is Phase.INIT and not any(row.sketched(i) for row, i, _ in self.parts)
                known = self.stored() or (self._complete and frozen)
                return state if known or state is not State.VALUE else State.UNRECORDED
        return State.ZERO if self._complete else State.UNRECORDED

    def stored(self) -> bool:
        """Whether `read` gives the tensor."""
        return self._complete and all(row.stored(i) for row, i, _ in self.parts)

    @property
    def _complete(self) -> bool:
        """Whether the parts are all of it."""
        held = sum(math.prod(row.layout.entries[i].shape) for row, i, _ in self.parts)
        return held == math.prod(self.parts[0][2].whole)

    def read(self) -> npt.NDArray[Any]:
        """The tensor: stored dtype, canonical shape."""
        entry = self.entry
        whole = np.zeros(entry.shape, DTYPES[entry.dtype])
        for row, i, piece in self.parts:
            values = row.read(i)
            whole[piece.box(values.shape)] = values
        return whole

    def digest(self) -> bytes:
        """16 bytes that are equal for equal tensors."""
        if self.stored() and self.state() in (State.VALUE, State.ZERO):
            return _digest(self.read())
        parts = b"".join(row.digests[i].tobytes() + piece.text.encode() for row, i, piece in self.parts)
        return xxhash.xxh3_128_digest(parts)

    def stats(self) -> npt.NDArray[np.float64]:
        """STATS, float64[7]."""
        held = [(row.stats[i], math.prod(row.layout.entries[i].shape)) for row, i, _ in self.parts]
        counts = [(one, size - one[_NAN] - one[_INF]) for one, size in held]
        finite = [(one, count) for one, count in counts if count > 0]
        whole = np.zeros(len(schema.STATS))
        for i in (_NAN, _INF, _ZEROS):
            whole[i] = sum(one[i] for one, _ in held)
        if finite:
            whole[_L2] = math.sqrt(sum(one[_L2] ** 2 for one, _ in finite))
            whole[_MIN], whole[_MAX] = min(one[_MIN] for one, _ in finite), max(one[_MAX] for one, _ in finite)
            whole[_MEAN] = sum(one[_MEAN] * count for one, count in finite) / sum(count for _, count in finite)
        return whole


def _digest(values: npt.NDArray[Any]) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


class BuiltLayout(Layout):
    """The records of built rows."""

    def __init__(self, trace: Trace, phase: Phase, entries: Sequence[IndexEntry]) -> None:
        self.trace = trace
        self.phase = phase
        self.group: Mapping[str, Any] = {}
        self.records = len(entries)
        self.digest = layout_digest(phase, entries)
        self._made = tuple(entries)

    @cached_property
    def entries(self) -> tuple[IndexEntry, ...]:
        """The index."""
        return self._made


class BuiltRow(RowView):
    """One row whose records come from sources.  `drifts`: those that several ranks should hold alike, and do not."""

    def __init__(
        self, layout: BuiltLayout, step: int, micro_batch: int, seal: bytes, sources: Sequence[Source],
        drifts: Sequence[Drift] = (),
    ) -> None:  # fmt: skip
        super().__init__(layout, 0, step, micro_batch, seal)
        self._sources = tuple(sources)
        self.drifts = tuple(drifts)

    @cached_property
    def _sealed(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.void]]:
        states = np.array([source.state() for source in self._sources], np.uint8)
        # A record that refers to another has that one's digest.
        digests = [
            self._of_target(i) if self.layout.entries[i].alias_of else source.digest()
            for i, source in enumerate(self._sources)
        ]
        return states, np.array([np.void(digest) for digest in digests], f"V{schema.DIGEST_BYTES}")

    def _of_target(self, i: int) -> bytes:
        row, position = self.target(i)
        if row.phase is self.phase:  # a tied weight: the row that is being made
            return self._sources[position].digest()
        return bytes(row.digests[position].tobytes())

    @cached_property
    def stats(self) -> npt.NDArray[np.float64]:
        """STATS of each record, float64[n, 7]."""
        stats = np.zeros((len(self._sources), len(schema.STATS)))
        for i, source in enumerate(self._sources):
            if self.layout.entries[i].alias_of:
                row, position = self.target(i)
                if row.phase is not self.phase:
                    stats[i] = row.stats[position]
                elif (held := self._sources[position]).state() in (State.VALUE, State.ZERO):
                    stats[i] = held.stats()
            elif source.state() in (State.VALUE, State.ZERO):
                stats[i] = source.stats()
        return stats

    def exact_digest(self, i: int) -> bool:
        """Whether the digest of record `i` is that of its tensor, as opposed to one of its parts' digests."""
        return bool(self.layout.entries[i].alias_of) or self._sources[i].exact_digest

    def stored(self, i: int) -> bool:
        """Whether the tensor of record `i` can be put together."""
        if self.layout.entries[i].alias_of:
            row, position = self.target(i)
            return row.stored(position)
        return self._sources[i].stored()

    def read(self, i: int) -> npt.NDArray[Any]:
        """Tensor of record `i`; see RowView.read."""
        if self.layout.entries[i].alias_of:
            row, position = self.target(i)
            return row.read(position)
        if not self.stored(i):
            raise ValueError(
                f"{self.layout.entries[i].name} is in {self.layout.trace.path} as digest and statistics only"
            )
        return self._sources[i].read()

    def sketched(self, i: int) -> bool:
        """Whether there is a sketch of record `i` instead of its tensor."""
        source = self._held(i)
        return source is not None and source.row.sketched(source.position)

    def read_sketch(self, i: int) -> npt.NDArray[np.float32]:
        """Sketch of record `i`, float32[61]; raises ValueError if there is none."""
        source = self._held(i)
        if source is None:
            raise ValueError(f"{self.layout.entries[i].name} has no sketch in {self.layout.trace.path}")
        return source.row.read_sketch(source.position)

    def _held(self, i: int) -> Held | None:
        source = self._sources[i]
        return source if isinstance(source, Held) else None

    def state(self, i: int) -> State:
        """State of record `i`."""
        try:
            return self._sources[i].state()
        except ValueError as error:
            raise Damaged(f"{self.layout.trace.path} is damaged: unknown state at {self.address()}") from error
