"""The HDF5 side of writing: types, row datasets, index tables, and the disk below them."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from tracer import schema
from tracer.dtypes import BFLOAT16, DTYPES

# Free space that must be left beside an allocation: HDF5's own metadata, and the end document.
RESERVE_BYTES: Final = 2 * 2**20


def row_dataset(group: Any, name: str, dtype: str | np.dtype[Any], tail: tuple[int, ...]) -> Any:
    """An empty [0, *tail] dataset with one chunk per row, allocated as soon as it grows and never pre-filled."""
    width = tuple(max(1, size) for size in tail)
    space = h5py.h5s.create_simple((0, *width), (h5py.h5s.UNLIMITED, *width))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, *width))
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
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


class Disk:
    """Asks for space before HDF5 does, so that a full disk is met while the file is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR)

    def require(self, more: int) -> None:
        """Raise OSError unless `more` bytes and the reserve can be added to the file."""
        wanted = more + RESERVE_BYTES
        if hasattr(os, "posix_fallocate"):
            size = os.fstat(self._fd).st_size
            try:
                os.posix_fallocate(self._fd, size, wanted)
            finally:
                os.ftruncate(self._fd, size)
        elif shutil.disk_usage(self._path.parent).free < wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_holes(self, start: int) -> None:
        """Back the bytes from `start` to the end of the file by real blocks."""
        size = os.fstat(self._fd).st_size
        if hasattr(os, "posix_fallocate") and size > start:
            os.posix_fallocate(self._fd, start, size - start)

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self._fd).st_size

    def sync(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)
