"""Dtypes of a run, as they are stored and as numpy computes with them.

The run's own dtype is kept: fp16 stays fp16 and bfloat16 is a true 2-byte HDF5 float (fields: sign 15,
exponent 7..14, mantissa 0..6, bias 127), which h5py reads as float32.  In memory bfloat16 is its uint16 bits, because
numpy has no such type.  Nothing is widened in the file.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

BFLOAT16: Final = "bfloat16"

# dtype of the run -> numpy dtype of its bytes in memory.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    BFLOAT16: np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

# Distance from 1.0 to the next larger number of each float type.
EPSILON: Final = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, BFLOAT16: 2.0**-7}


def is_float(dtype: str) -> bool:
    """Whether a dtype of a run is a floating-point one."""
    return dtype in EPSILON


def coarser(a: str, b: str) -> str:
    """The float dtype with the larger epsilon of the two; a non-float counts as exact."""
    return a if EPSILON.get(a, 0.0) >= EPSILON.get(b, 0.0) else b


def bf16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact value of bfloat16 bits, any shape, as float32."""
    wide = np.left_shift(bits.astype(np.uint32), 16).view(np.float32)
    return np.asarray(wide)  # arithmetic turns arrays without dimensions into scalars


def float32_to_bf16(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Round float32 values to bfloat16 bits, to nearest even, NaN kept as a quiet NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_numpy(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Stored array -> array with numbers in it: bfloat16 bits become float32, the rest is returned as it is."""
    return bf16_to_float32(stored) if dtype == BFLOAT16 else stored


def to_float64(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """Stored array -> float64, exact for every float type."""
    return to_numpy(stored, dtype).astype(np.float64)


def from_float64(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[Any]:
    """float64 -> stored array of a dtype, rounded to nearest; bfloat16 as bits."""
    if dtype == BFLOAT16:
        return float32_to_bf16(np.asarray(values, np.float32))
    return np.asarray(values).astype(DTYPES[dtype])
