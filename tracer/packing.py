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
    tables = Tables(np.zeros(n, f"V{schema.DIGEST_BYTES}"), np.zeros(n, np.uint8), np.zeros((n, len(schema.STATS))))
    for i, (record, slot) in enumerate(zip(records, slots, strict=True)):
        tables.state[i] = record.state
        if record.fingerprint is not None:
            tables.digest[i] = np.void(record.fingerprint.digest)
            tables.stats[i] = record.fingerprint.stats
            if record.fingerprint.sketch is not None:
                packed[slot.dataset][slot.offset : slot.offset + slot.size] = record.fingerprint.sketch
            continue
        if record.data is None:
            continue
        if slot.dataset and slot.size:
            values = packed[slot.dataset][slot.offset : slot.offset + slot.size]
            values.reshape(record.shape)[...] = record.data
        else:
            values = np.ascontiguousarray(record.data).reshape(-1)
        tables.digest[i] = np.void(xxhash.xxh3_128_digest(values.view(np.uint8).data))
        tables.stats[i] = statistics(values, record.dtype)
        if record.state is State.VALUE and slot.size and tables.stats[i, _ZEROS] == slot.size:
            tables.state[i] = State.ZERO
    return tables


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
