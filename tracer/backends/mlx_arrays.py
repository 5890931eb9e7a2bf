"""MLX arrays as numpy arrays, on the training thread.

MLX arrays are immutable, but their memory is reused once nothing refers to them: what is handed on is a copy, or a view
that keeps the array alive.  An array that was seen while a function was being traced has no value: it converts to
None, which is a record in the state `unrecorded`, and never to a wrong number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tracer.dtypes import DTYPES
from tracer.names import NameMap
from tracer.recorder import make_record
from tracer.schema import Record, State

# mlx.core.array, and nested dicts and lists of them; MLX is imported by the program, never by this module.
Array = Any
Tree = Any


def flatten(tree: Tree) -> dict[str, Array]:
    """Dotted path -> array, for the arrays of a tree."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    return {path: leaf for path, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)}


def dtype_name(array: Array) -> str:
    """Dtype of the run: `float32`, `bfloat16`."""
    return str(array.dtype).rpartition(".")[2]


def evaluate(arrays: Iterable[Array]) -> bool:
    """Evaluate all at once; False if one of them has no value because a function was being traced."""
    import mlx.core as mx

    try:
        mx.eval(list(arrays))
    except (ValueError, RuntimeError):
        return False
    return True


def to_numpy(array: Array, *, copy: bool = True) -> npt.NDArray[Any] | None:
    """Value of an array, bfloat16 as uint16 bits; None if it has none.

    Without `copy` the memory is shared and kept alive: for arrays that are not large only once.
    """
    import mlx.core as mx

    if dtype_name(array) not in DTYPES or not evaluate([array]):
        return None
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(plain) if copy else np.asarray(plain)


def array_record(names: NameMap, original: str, array: Array, *, copy: bool = True, **fields: Any) -> Record:
    """Record of an array under its canonical name; state `unrecorded` if it has no value."""
    value = to_numpy(array, copy=copy)
    dtype = dtype_name(array)
    if value is None:
        fields.update(shape=array.shape, state=State.UNRECORDED)
        dtype = dtype if dtype in DTYPES else "float32"
    return make_record(names, original, value, dtype, **fields)


def plain_record(name: str, value: npt.ArrayLike, dtype: str, **fields: Any) -> Record:
    """Record of a numpy value under a name that needs no mapping."""
    array = np.asarray(value, DTYPES[dtype])
    return Record(name, array, dtype, array.shape, **fields)


def unrecorded(name: str, dtype: str = "float32", shape: tuple[int, ...] = ()) -> Record:
    """There was something here that could not be taken."""
    return Record(name, None, dtype, shape, state=State.UNRECORDED)


def same_bits(a: Record, b: Record) -> bool:
    """Whether two records hold the same bits."""
    if a.data is None or b.data is None:
        return a.data is b.data and a.state == b.state
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.data is b.data or np.array_equal(_bits(a.data), _bits(b.data))


def _bits(data: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
