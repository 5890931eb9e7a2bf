"""Read the small tables of an open trace: steps, rows, indices, and the attributes of a layout.

Through h5py's low-level interface, because its other one makes a numpy type of everything that it opens, which takes
ten times as long as reading it; only what is of another type than the one in `tracer/schema.py` is read the long way.
Whatever HDF5 says of damaged bytes is raised as it is, and a table that claims to be larger than its file is a ValueError:
callers turn both into Damaged.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5s, h5t, h5z

from tracer import schema

STEPS: Final = np.dtype(schema.STEP_DTYPE)
ROWS: Final = np.dtype(schema.ROW_DTYPE)
_DIGEST: Final = np.dtype(f"V{schema.DIGEST_BYTES}")
_COUNT: Final = np.dtype("<i8")


def read_table(group: Any, name: str, dtype: np.dtype[Any], most: int) -> npt.NDArray[Any]:
    """A whole table of that type.  `most`: bytes that it can have if it is not compressed, those of the file."""
    dataset, kind = h5d.open(group.id, name.encode()), _file_type(dtype)
    found = dataset.get_type()
    shape = _shape(dataset, found.get_size(), most, name)
    table: npt.NDArray[Any] = np.empty(shape, dtype) if found.equal(kind) else group[name][...]
    if found.equal(kind):
        dataset.read(h5s.ALL, h5s.ALL, table, kind)
    return table


def read_index(group: Any, most: int) -> list[list[str]]:
    """The index of a layout: the fields of each entry as text.  `most`: see `read_table`."""
    dataset = h5d.open(group.id, schema.INDEX.encode())
    kind = dataset.get_type()
    width = kind.get_size()
    table = np.empty(_shape(dataset, width, most, schema.INDEX), f"V{width}")
    dataset.read(h5s.ALL, h5s.ALL, table, kind)
    starts = [kind.get_member_offset(i) for i in range(kind.get_nmembers())]
    ends = [start + kind.get_member_type(i).get_size() for i, start in enumerate(starts)]
    fields, data = list(zip(starts, ends, strict=True)), table.tobytes()
    return [
        [data[at + start : at + end].rstrip(b"\0").decode() for start, end in fields]
        for at in range(0, len(data), width)
    ]


def layout_attributes(group: Any) -> tuple[bytes, int]:
    """A layout's digest, and how many records it has."""
    return _attribute(group, "digest", _DIGEST).tobytes(), int(_attribute(group, "records", _COUNT))


def _attribute(group: Any, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    attribute, kind = h5a.open(group.id, name.encode()), _file_type(dtype)
    if attribute.shape != () or not attribute.get_type().equal(kind):
        return np.asarray(group.attrs[name])
    value = np.empty((), dtype)
    attribute.read(value, kind)
    return value


def _shape(dataset: Any, width: int, most: int, name: str) -> tuple[int, ...]:
    shape: tuple[int, ...] = dataset.shape
    if math.prod(shape) * width > most and dataset.get_create_plist().get_filter_by_id(h5z.FILTER_DEFLATE) is None:
        raise ValueError(f"{name} claims to be larger than the file")
    return shape


@cache
def _file_type(dtype: np.dtype[Any]) -> Any:
    return h5t.py_create(dtype, logical=True)
