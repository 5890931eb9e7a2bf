"""Move a run's starting point by one rounding unit: the twin, whose distance from the run is the noise floor.

Every element of every trainable parameter goes to the next or the previous number of its dtype, at random with a seed of its
own; zeros stay zero, so that a freshly initialised lora_B is still zero.  Draws nothing from the run's generators.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.dtypes import DTYPES, is_float

# Dtypes whose rounding drowns that of float32 adapters.
HALVES: Final = ("float16", "bfloat16")
# Unsigned view of each float dtype: the next number away from zero has the next bit pattern.
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What a twin changes: `by` in words (`rounding`, `threads`, `eager`).

    `seed`: that of the moved starting point, None where it is not moved.  `base`: move the frozen weights too, also in float32.
    """

    by: str
    seed: int | None = None
    base: bool = False

    def moves(self, dtype: str, *, trained: bool) -> bool:
        """Whether a parameter of this dtype is moved; frozen ones of 16 bits always are.

        Adapters start with lora_B = 0 and a float32 unit of lora_A is lost in 16-bit activations: the twin would show no noise.
        """
        return self.seed is not None and (trained or self.base or dtype in HALVES)

    def facts(self) -> dict[str, object]:
        """What the twin's trace says of itself, among what was observed."""
        facts: dict[str, object] = {"twin": self.by}
        return facts if self.seed is None else {**facts, "twin.seed": self.seed, "twin.base": self.base}


def nudge(stored: npt.NDArray[Any], dtype: str, name: str, seed: int) -> npt.NDArray[Any]:
    """A copy of a stored array, each finite non-zero element moved by one unit in the last place.

    `stored`: any shape, bfloat16 as uint16 bits.  The direction depends on `name`, `seed` and the position only, so
    that a twin can be made again.  Integers come back as they are.
    """
    if not is_float(dtype):
        return stored.copy()
    size = DTYPES[dtype].itemsize
    bits = np.ascontiguousarray(stored).view(_BITS[size]).copy()
    unsigned = bits.dtype.type
    magnitude = bits & unsigned((1 << (8 * size - 1)) - 1)
    infinity = {"float64": 0x7FF0 << 48, "float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    movable = (magnitude > 1) & (magnitude < unsigned(infinity - 1))
    up = np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(0, 2, bits.shape, dtype=np.bool_)
    bits[movable & up] += unsigned(1)
    bits[movable & ~up] -= unsigned(1)
    return bits.view(DTYPES[dtype]).reshape(stored.shape)
