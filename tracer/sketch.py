"""A seeded random projection of a tensor: 61 numbers from which the distance of two tensors can be estimated.

    sketch[j] = sum of sign(i) * x[i] over the elements i with i mod 61 == j           (CountSketch)
    sign(i)   = +1 where bit i mod 64 of splitmix64(SEED + i // 64) is 0, else -1
    |x - y|   is estimated by |sketch(x) - sketch(y)|: its square is unbiased, whatever x and y are

Elements are counted in canonical layout, added up in float64 and kept as float32; what is not finite counts as zero (the
statistics count it).  A prime number of buckets does not resonate with rows and columns, as contiguous pieces would.
Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", 2002.  Depends on no generator of numpy's,
so that a file of today can be compared in ten years.  Measured accuracy: docs/fingerprints.md.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.dtypes import to_float64
from tracer.schema import SKETCH_BUCKETS

SEED: Final = 0x7374657074726163
_WORD: Final = 64
# Elements at a time: a multiple of the number of buckets and of the bits in a word.
BLOCK: Final = SKETCH_BUCKETS * _WORD * 256
# The distance of two sketches says nothing about differences below this share of a tensor's norm: they are float32.
FLOOR: Final = 1e-6

Sketch = npt.NDArray[np.float32]


def sketch(values: npt.NDArray[Any], dtype: str) -> Sketch:
    """Sketch of a stored array of any shape (bfloat16 as bits) in canonical layout: float32[61]."""
    flat = values.reshape(-1)
    total = np.zeros(SKETCH_BUCKETS)
    for start in range(0, flat.size, BLOCK):
        block = to_float64(flat[start : start + BLOCK], dtype)
        block = np.where(np.isfinite(block), block, 0.0) * _signs(start)[: block.size]
        whole = block.size - block.size % SKETCH_BUCKETS
        total += block[:whole].reshape(-1, SKETCH_BUCKETS).sum(axis=0)
        total[: block.size - whole] += block[whole:]
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def sketch_distance(a: Sketch, b: Sketch) -> float:
    """Estimated L2 norm of the difference of two tensors; inf where a sketch has overflowed."""
    with np.errstate(invalid="ignore"):
        delta = a.astype(np.float64) - b.astype(np.float64)
    distance = math.sqrt(float(np.einsum("i,i->", delta, delta)))
    return distance if math.isfinite(distance) else math.inf


@lru_cache(maxsize=4)
def _signs(start: int) -> npt.NDArray[np.float64]:
    """Signs of the elements start .. start + BLOCK."""
    words = _splitmix64(np.arange(start // _WORD, (start + BLOCK) // _WORD, dtype=np.uint64) + np.uint64(SEED))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return np.where(bits == 1, -1.0, 1.0)


def _splitmix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    with np.errstate(over="ignore"):
        mixed = state + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
