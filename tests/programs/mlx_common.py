"""Shared by the MLX training programs: a tiny model, and a fingerprint of everything that a run leaves behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def bits(array: mx.array) -> np.ndarray[Any, Any]:
    """Value of an array, bfloat16 as uint16 bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def digest(tree: Any) -> str:
    """SHA-256 over names, dtypes and bits of a tree of arrays."""
    found = hashlib.sha256()
    for name, array in sorted(tree_flatten(tree)):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(bits(array).tobytes())
    return found.hexdigest()


def leave(path: str, *, losses: list[float], model: Any, optimizer: Any, **more: Any) -> None:
    """Write the fingerprint of a run: losses, parameters, optimizer state, generator."""
    result = {
        "losses": [float(loss).hex() for loss in losses],
        "parameters": digest(model.parameters()),
        "optimizer": digest(optimizer.state),
        "rng": [int(word) for word in bits(mx.random.state[0])],
        **more,
    }
    Path(path).write_text(json.dumps(result, sort_keys=True))


def rows(steps: int, batch: int, width: int, vocabulary: int) -> np.ndarray[Any, Any]:
    """Token ids, int32[steps, batch, width]."""
    return np.random.RandomState(7).randint(1, vocabulary, (steps, batch, width)).astype(np.int32)
