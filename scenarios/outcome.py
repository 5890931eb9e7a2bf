"""What a run ended with, and one digest per part, to compare two runs to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

PARTS: Final = ("losses", "parameters", "optimizer", "rng")
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of a run.  Losses are one per micro-batch as the trainer reports them; the rest is by the framework's own
    names and in its own layout, bfloat16 as uint16 bits.  None: a program of its own that does not say."""

    losses: tuple[float, ...] | None
    parameters: Arrays
    optimizer: Arrays | None
    rng: Arrays

    def digests(self) -> dict[str, str]:
        """SHA-256 of each part that is known; equal digests mean equal names, dtypes, shapes and bits."""
        losses = None if self.losses is None else {"losses": np.array(self.losses, np.float64)}
        parts: tuple[Arrays | None, ...] = (losses, self.parameters, self.optimizer, self.rng)
        return {name: _digest(arrays) for name, arrays in zip(PARTS, parts, strict=True) if arrays is not None}

    def summary(self) -> dict[str, Any]:
        """JSON-able: digests, losses as hexadecimal floats (exact) and as numbers, number of trainable tensors."""
        losses = self.losses or ()
        return {
            "digests": self.digests(),
            "losses": [float(loss) for loss in losses],
            "losses_hex": [float(loss).hex() for loss in losses],
            "parameters": len(self.parameters),
        }


def numpy_state() -> npt.NDArray[np.uint64]:
    """State of numpy's global generator: its words and the position in them."""
    state: Any = np.random.get_state()
    return np.append(state[1].astype(np.uint64), np.uint64(state[2]))


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
