"""The HDF5 side of writing: types, row datasets, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import h5py
import numpy as np

from tracer import schema
from tracer.dtypes import BFLOAT16, DTYPES

# Entries of a table that are allocated at a time.
TABLE_CHUNK: Final = 64


def row_dataset(group: Any, name: str, dtype: str | np.dtype[Any], tail: tuple[int, ...]) -> Any:
    """An empty [0, *tail] dataset with one chunk per row, allocated as soon as it grows and never pre-filled."""
    width = tuple(max(1, size) for size in tail)
    space = h5py.h5s.create_simple((0, *width), (h5py.h5s.UNLIMITED, *width))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, *width))
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), hdf5_type(dtype), space, plist))


def table_dataset(group: Any, name: str, dtype: np.dtype[Any]) -> Any:
    """An empty 1-D table of a structured dtype that grows by TABLE_CHUNK entries, which are zero at first."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((TABLE_CHUNK,))
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    space = h5py.h5s.create_simple((0,), (h5py.h5s.UNLIMITED,))
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), hdf5_type(dtype), space, plist))


def hdf5_type(dtype: str | np.dtype[Any]) -> Any:
    """HDF5 type of a dtype of a run (or of a numpy dtype): bfloat16 is a float of 2 bytes with 8 exponent bits."""
    if dtype == BFLOAT16:
        bfloat16 = h5py.h5t.IEEE_F16LE.copy()
        bfloat16.set_fields(15, 7, 8, 0, 7)
        bfloat16.set_ebias(127)
        return bfloat16
    return h5py.h5t.py_create(DTYPES[dtype] if isinstance(dtype, str) else dtype, logical=True)


def write_index(group: Any, entries: Sequence[schema.IndexEntry]) -> None:
    """Write a layout's index as a table of fixed-length strings."""
    columns = [[str(value).encode() for value in entry.as_text()] for entry in entries]
    widths = [max((len(row[i]) for row in columns), default=1) or 1 for i in range(len(schema.INDEX_FIELDS))]
    dtype = [(name, f"S{width}") for (name, _), width in zip(schema.INDEX_FIELDS, widths, strict=True)]
    table = np.array([tuple(row) for row in columns], dtype)
    if table.size:
        group.create_dataset(schema.INDEX, data=table, chunks=(len(table),), compression="gzip", compression_opts=4)
    else:
        group.create_dataset(schema.INDEX, data=table)


def bytes_per_row(dataset: Any) -> int:
    """Bytes that one row of a row dataset takes in the file."""
    return math.prod(map(int, dataset.shape[1:])) * int(dataset.id.get_type().get_size())
