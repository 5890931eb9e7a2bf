"""Lay a row's records out in packed arrays, and measure each: digest, state, statistics.

Pure numpy; knows neither HDF5 nor a framework.  A record is measured in canonical layout, so that the same numbers under two
frameworks have the same digest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from tracer import schema
from tracer.dtypes import DTYPES, to_float64
from tracer.schema import IndexEntry, Record, Row, State

# A packed dataset's row is one HDF5 chunk, and a chunk stays below 4 GiB; larger phases use several datasets.
MAX_ROW_BYTES: Final = 2 * 2**30
# Statistics are computed over this many elements at a time, so that they need no second copy of a large tensor.
BLOCK: Final = 2**20
# Tensors of up to this many elements are measured together with others of their size.  Larger ones are not worth it, and numpy
# adds the squares of several in another order than those of one when they do not fit its buffer, which is of this size.
TOGETHER: Final = 8192


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a record of a layout is packed: dataset name (empty: not stored), first element, element count."""

    dataset: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Tables:
    """A row's tables: digest V16[n], state uint8[n], stats float64[n, 7]."""

    digest: npt.NDArray[np.void]
    state: npt.NDArray[np.uint8]
    stats: npt.NDArray[np.float64]


# A row that has been written: name -> position, and its tables.
Written = tuple[dict[str, int], Tables]


def copy_aliased(row: Row, tables: Tables, done: Mapping[tuple[str, int], Written]) -> None:
    """A record that refers to another has that one's digest, state and statistics."""
    for i, record in enumerate(row.records):
        if record.alias_of:
            label, _, name = record.alias_of.partition("/")
            if (label, row.micro_batch) not in done or name not in done[label, row.micro_batch][0]:
                raise ValueError(f"{record.name} refers to {record.alias_of}, which this step does not have")
            positions, source = done[label, row.micro_batch]
            position = positions[name]
            tables.digest[i] = source.digest[position]
            tables.state[i] = source.state[position]
            tables.stats[i] = source.stats[position]


def pack_plan(records: Sequence[Record]) -> tuple[list[Slot], dict[str, tuple[str, int]]]:
    """Slots of the records, and per packed dataset its dtype and width in elements."""
    slots: list[Slot] = []
    widths: dict[str, tuple[str, int]] = {}
    current: dict[str, str] = {}
    for record in records:
        size = math.prod(record.shape)
        if record.sketched:
            _, used = widths.get(schema.SKETCH, ("float32", 0))
            slots.append(Slot(schema.SKETCH, used, schema.SKETCH_BUCKETS))
            widths[schema.SKETCH] = ("float32", used + schema.SKETCH_BUCKETS)
            continue
        if not record.stored or record.alias_of:
            slots.append(Slot("", 0, size))
            continue
        name = current.get(record.dtype, record.dtype)
        _, used = widths.get(name, (record.dtype, 0))
        if used and (used + size) * DTYPES[record.dtype].itemsize > MAX_ROW_BYTES:
            name = f"{record.dtype}.{sum(1 for dtype, _ in widths.values() if dtype == record.dtype)}"
            used = 0
        current[record.dtype] = name
        slots.append(Slot(name, used, size))
        widths[name] = (record.dtype, used + size)
    return slots, {name: plan for name, plan in widths.items() if plan[1]}


def measure(records: Sequence[Record], slots: Sequence[Slot], packed: Mapping[str, npt.NDArray[Any]]) -> Tables:
    """Pack the records' data into `packed` and measure each: digest, state, statistics."""
    n = len(records)
    states = np.array([record.state for record in records], np.uint8)
    tables = Tables(np.zeros(n, f"V{schema.DIGEST_BYTES}"), states, np.zeros((n, len(schema.STATS))))
    stored: dict[str, list[int]] = {name: [] for name in packed}
    for i, (record, slot) in enumerate(zip(records, slots, strict=True)):
        if record.fingerprint is not None:
            tables.digest[i] = np.void(record.fingerprint.digest)
            tables.stats[i] = record.fingerprint.stats
            if record.fingerprint.sketch is not None:
                packed[slot.dataset][slot.offset : slot.offset + slot.size] = record.fingerprint.sketch
        elif record.data is None:
            continue
        elif slot.dataset and slot.size:
            stored[slot.dataset].append(i)
        else:
            values = np.ascontiguousarray(record.data).reshape(-1)
            tables.digest[i] = np.void(xxhash.xxh3_128_digest(values.view(np.uint8).data))
            tables.stats[i] = statistics(values, record.dtype)
    for name, indices in stored.items():
        if not indices:
            continue
        row, places = packed[name], [slots[i] for i in indices]
        _copy([records[i] for i in indices], places, row)
        tables.digest[indices] = _digests(row, places)
        tables.stats[indices] = _statistics(row, places, records[indices[0]].dtype)
    # Of a fingerprint the state is known, and its slot has the size of the sketch.
    sizes = np.array(
        [0 if r.fingerprint is not None else slot.size for r, slot in zip(records, slots, strict=True)], np.int64
    )
    states[(states == State.VALUE) & (sizes > 0) & (tables.stats[:, _ZEROS] == sizes)] = State.ZERO
    return tables


def _copy(records: Sequence[Record], places: Sequence[Slot], row: npt.NDArray[Any]) -> None:
    """Copy records to their places in a packed row."""
    for record, slot in zip(records, places, strict=True):
        row[slot.offset : slot.offset + slot.size].reshape(record.shape)[...] = record.data


def _digests(row: npt.NDArray[Any], places: Sequence[Slot]) -> npt.NDArray[np.void]:
    """Digest of each place of a packed row, V16[n]."""
    data, width = row.view(np.uint8).data, row.itemsize
    found = [xxhash.xxh3_128_digest(data[s.offset * width : (s.offset + s.size) * width]) for s in places]
    return np.frombuffer(b"".join(found), f"V{schema.DIGEST_BYTES}")


def _statistics(row: npt.NDArray[Any], places: Sequence[Slot], dtype: str) -> npt.NDArray[np.float64]:
    """STATS of each place of a packed row, float64[n, 7]; to the bit what `statistics` says of one alone.

    A model has hundreds of small tensors of a few sizes: those of a size are measured together, with as many calls as one takes.
    """
    found = np.empty((len(places), len(schema.STATS)))
    by_size: dict[int, list[int]] = {}
    for i, slot in enumerate(places):
        by_size.setdefault(slot.size, []).append(i)
    for size, indices in by_size.items():
        at_once = BLOCK // size if size <= TOGETHER else 1
        for start in range(0, len(indices), at_once):
            group = indices[start : start + at_once]
            values = [row[places[i].offset : places[i].offset + size] for i in group]
            if len(group) == 1:
                found[group[0]] = statistics(values[0], dtype)
            else:
                found[group] = _statistics_of_equals(np.concatenate(values).reshape(-1, size), dtype)
    return found


def _statistics_of_equals(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """STATS of each row of a stored array [k, at most TOGETHER]: float64[k, 7]."""
    numbers = to_float64(values, dtype)
    k, size = len(numbers), int(numbers.shape[1])
    with np.errstate(all="ignore"):
        squares = np.einsum("ki,ki->k", numbers, numbers)
        finite = np.isfinite(squares)
        columns = (np.sqrt(squares), numbers.min(axis=1), numbers.max(axis=1), numbers.sum(axis=1) / size)
    found = np.zeros((k, len(schema.STATS)))
    for i, column in enumerate(columns):
        found[:, i] = column
    found[:, _ZEROS] = size - np.count_nonzero(numbers, axis=1).astype(np.int64)
    for row in np.flatnonzero(~finite):
        found[row] = statistics(values[row], dtype)
    return found


_ZEROS: Final = schema.STATS.index("zeros")


def _square_sum(values: npt.NDArray[np.float64]) -> float:
    # Not np.dot: BLAS would wake its threads for every tensor and take the cores from the run (measured: 0.6 ms a call).
    return float(np.einsum("i,i->", values, values))


def statistics(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """STATS of a flat stored array, float64[7].

    l2, min, max and mean are over the finite elements, accumulated in float64; 0 where there are none.
    """
    l2 = total = 0.0
    low, high = math.inf, -math.inf
    nan = inf = zeros = finite_count = 0
    for start in range(0, values.size, BLOCK):
        block = to_float64(values[start : start + BLOCK], dtype)
        zeros += block.size - int(np.count_nonzero(block))
        with np.errstate(all="ignore"):
            square = _square_sum(block)
            if not math.isfinite(square):
                # Something is nan or inf (or its square is too large): look closer.
                nan += int(np.count_nonzero(np.isnan(block)))
                inf += int(np.count_nonzero(np.isinf(block)))
                block = block[np.isfinite(block)]
                square = _square_sum(block)
        if block.size:
            l2 += square
            total += float(block.sum())
            low, high = min(low, float(block.min())), max(high, float(block.max()))
            finite_count += block.size
    if not finite_count:
        return np.array([0.0, 0.0, 0.0, 0.0, nan, inf, zeros])
    return np.array([math.sqrt(l2), low, high, total / finite_count, nan, inf, zeros])


def index_entry(record: Record, slot: Slot) -> IndexEntry:
    """The index entry of a record that lies in a slot."""
    return IndexEntry(
        record.name,
        record.dtype,
        record.shape,
        slot.dataset,
        slot.offset,
        record.original or record.name,
        record.transform,
        record.alias_of,
    )
